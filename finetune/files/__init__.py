"""A model folder on disk: fetched, read, checked and written in the layout of the Hugging Face hub.

Reading order: tensorfile and jsonblock (one file), layouts (how files order experts), basefiles and keycheck (a base
is complete or refused), hub, hubconfig and hubfiles (the small files), writer and atomic (writing), fingerprint;
readers (releases that were tried); tiny and vocabulary make small bases.
"""

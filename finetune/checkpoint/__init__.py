"""The state of a run on disk, and back on any number of ranks.

Reading order: slices (what a rank holds), pieces (who writes what), manifest and stored (what a checkpoint records and
holds), folder (the newest, and which are removed), adapter (written beside it), checkpoints (saving and restoring);
run_lock (one start at a time in the folder of a run).
"""

"""The state of a run on disk, and back on any number of ranks.

Reading order: slices (what a rank holds), pieces (who writes what), manifest and stored (what a checkpoint says and
holds), folder (which is the newest, which go), adapter (written beside it), checkpoints (saving and restoring).
"""

"""Save the state of a run to disk, and restore it on any number of ranks.

Reading order: slices (what a rank has), pieces (who writes what), manifest and stored (what a checkpoint records and
contains), folder (which to resume and which to remove), adapter (written with it), checkpoints (saving and restoring);
run_folder and run_lock (the folder of a run, and one start at a time in it).
"""

"""The state of a run on disk, and back on any number of ranks."""

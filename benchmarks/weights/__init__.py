"""Benchmarks of weights on disk: loading, checkpoints, export and merge."""

"""A simulated second device for machines without a GPU, and counts of its kernels, waits and operations."""

"""A second device on a machine without one, and what is counted on it: kernels, waits, operations."""

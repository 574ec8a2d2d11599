"""Shared parts of the benchmarks: figures, the machine, processes, memory measurement and comparison of outputs."""

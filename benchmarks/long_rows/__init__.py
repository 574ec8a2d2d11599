"""Benchmarks of long rows: sequence parallelism, memory, needles."""

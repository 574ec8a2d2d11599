"""Benchmarks of data: building, planning, packing, reading and resuming."""

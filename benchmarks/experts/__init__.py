"""Benchmarks of the expert block: time, traffic, memory, and the exchange between ranks."""

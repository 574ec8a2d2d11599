"""Benchmarks of the expert block: time, bytes, memory, and the exchange between ranks."""

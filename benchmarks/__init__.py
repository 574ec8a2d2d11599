"""Benchmarks against stock libraries: `python -m benchmarks NAME`."""

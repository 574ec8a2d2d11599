"""Figures beside the peer's: `python -m benchmarks NAME`."""

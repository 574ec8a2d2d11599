"""Benchmarks of whole training steps, and of what surrounds them."""

"""Benchmarks of full training steps and of the work around them."""

"""Experts: layout arithmetic, grouped experts with LoRA, the expert-parallel layer, balance. Knows no data."""

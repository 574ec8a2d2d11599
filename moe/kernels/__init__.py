"""Frozen matrices in 8 and 4 bits: int8 and nf4 (the arithmetic), packed (a matrix as one row of bytes), linear;
fused (the same arithmetic as one kernel on a GPU).
"""

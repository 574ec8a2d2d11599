"""Frozen matrices in 8 and 4 bits. Reading order: packed (a matrix as a row of bytes), int8 and nf4 (the arithmetic),
fused (the same arithmetic as one kernel on a GPU), linear (a layer).
"""

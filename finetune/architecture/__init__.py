"""The base model as numbers: its sizes, tensors, parts, positions and operations. Loads no torch and reads no file.

Reading order: families with family_problems (sizes), shapes (every tensor of a model), parts (units that can train),
trained (the tensors that do), rank_shares (bytes that each rank reads and keeps), yarn (a longer context), flops.
"""

"""Before a run: what it will take, and what would stop it.

Reading order: plan (one run foreseen), rank_layout, tensors, memory, moments and activations (bytes), operations,
layer, experts, tower, vision and time (seconds), wire (traffic), fit (what to choose), gpus, text; foresight,
doctor and cluster_check (a machine).
"""

"""What a run will take.

Reading order: plan (one run foreseen), rank_layout, memory, moments and activations (bytes), operations,
layer, experts, tower, vision and time (seconds), wire (traffic), fit (what to choose), gpus, text; foresight.
"""

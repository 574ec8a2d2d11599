"""Estimates the memory, traffic, time and cost of a run before it starts.

Reading order: plan (the estimate of one run), rank_layout, memory, moments and activations (bytes), operations,
layer, experts, tower, vision and time (seconds), wire (traffic), fit (layouts to choose from), gpus, text; foresight.
"""

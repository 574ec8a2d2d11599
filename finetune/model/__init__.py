"""The network: built without weights, adapted, filled, and what one packed row computes in it.

Reading order: empty and build, lora, resident, weights and sources (filling), gather (back out); then forward with
row, sight, varlen, sequence* (rows over several ranks), loss, tiled_norm and recompute; divergence compares
a tuned model with its base.
"""

"""The network: how it is built without weights, adapted and filled, and how it computes one packed row.

Reading order: empty and build, lora, resident, weights and sources (filling), gather (back to files); then forward
with row, sight, varlen, sequence* (rows over several ranks), loss, tiled_norm and recompute; divergence compares
a tuned model with its base.
"""

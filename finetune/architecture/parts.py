"""The parts of a model, by the keys of `adapters:`: what trains or stays frozen together, and what cannot be adapted.

Loads no torch.
"""

PARTS = (
    "attention",
    "experts",
    "router",
    "mlp",
    "vision_blocks",
    "merger",
    "deepstack_mergers",
    "patch_embed",
    "pos_embed",
    "norms",
    "embeddings",
    "head",
)
"""In the order of `adapters:`. `finetune.architecture.shapes` counts them and finds the part of a tensor."""

DECODER = ("attention", "experts", "router", "mlp", "norms")
"""Parts of a decoder layer."""
TOWER = ("vision_blocks", "patch_embed", "pos_embed")
MERGERS = ("merger", "deepstack_mergers")
VISION = (*TOWER, *MERGERS)
TIED = ("embeddings", "head")
"""One and the same weight where the base ties them."""

NO_LORA = {
    "patch_embed": "it is one Conv3d over raw pixels, whose adapter no server reads",
    "pos_embed": "it is a table that the tower interpolates, not a matrix that anything is multiplied by",
    "norms": "a norm's weight is a vector, which has no low-rank form",
    "embeddings": "an adapter on the token table is not read by servers of this model",
    "head": "the loss multiplies by the head's own weight tile by tile, and servers of this model adapt no head",
}
"""Parts that are frozen or trained in full, never adapted, and why."""

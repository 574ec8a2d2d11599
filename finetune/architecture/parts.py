"""The parts of a model, named by the keys of `adapters:`, each of which trains or is frozen as a unit.

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
"""All parts, in the order of `adapters:`. `finetune.architecture.shapes` counts them and finds a tensor's part."""

DECODER = ("attention", "experts", "router", "mlp", "norms")
"""Parts of a decoder layer."""
TOWER = ("vision_blocks", "patch_embed", "pos_embed")
MERGERS = ("merger", "deepstack_mergers")
VISION = (*TOWER, *MERGERS)
TIED = ("embeddings", "head")
"""The parts that share one weight if the base ties them."""

QUANTISED_DENSE = ("attention", "mlp")
"""The parts whose matrices `model.quantise.dense` quantises, where they are frozen or have an adapter."""

NO_LORA = {
    "patch_embed": "it is one Conv3d over raw pixels, and no server loads an adapter of it",
    "pos_embed": "it is a table that the tower interpolates, not a matrix that inputs are multiplied by",
    "norms": "a norm's weight is a vector, which has no low-rank form",
    "embeddings": "servers of this model load no adapter on the token table",
    "head": "the loss uses the head's own weight tile by tile, and servers of this model load no adapter on the head",
}
"""Parts that can be frozen or trained in full but not adapted, each with the reason."""

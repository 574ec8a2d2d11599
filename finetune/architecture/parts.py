"""The families of parameters as a user names them, the parts of the model they stand for, and what cannot be adapted.

Loads no torch.
"""

FAMILIES = {
    "attention": "attention",
    "experts": "experts",
    "router": "router",
    "mlp": "mlp",
    "vision_blocks": "vision_blocks",
    "merger": "merger",
    "deepstack_mergers": "deepstack_mergers",
    "patch_embed": "patch_embed",
    "pos_embed": "pos_embed",
    "norms": "norms",
    "embeddings": "embed_tokens",
    "head": "lm_head",
}
"""Key of `adapters:` -> part, as `finetune.architecture.shapes` calls it."""

TIED = ("embeddings", "head")
"""One and the same weight where the base ties them."""

NO_LORA = {
    "patch_embed": "it is one Conv3d over raw pixels, whose adapter no server reads",
    "pos_embed": "it is a table that the tower interpolates, not a matrix that anything is multiplied by",
    "norms": "a norm's weight is a vector, which has no low-rank form",
    "embeddings": "an adapter on the token table is not read by servers of this model",
    "head": "the loss multiplies by the head's own weight tile by tile, and servers of this model adapt no head",
}
"""Families that are frozen or trained in full, never adapted, and why."""

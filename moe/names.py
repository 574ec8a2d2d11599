"""Canonical names of our parameters. Loads no torch.

The canonical name of a base weight is its key in a transformers 5 state dict; that of an adapter tensor is its key in a
PEFT file. Checkpoints, loaders and exporters all use canonical names; only this file knows both.

With L = a decoder layer and P = base_model.model., our names are on the left:

    L.mlp.experts.gate_up               L.mlp.experts.gate_up_proj
    L.mlp.experts.down                  L.mlp.experts.down_proj
    L.mlp.experts.gate_up_lora_A, _B    P L.mlp.experts.base_layer.lora_A.weight, lora_B
    L.mlp.experts.down_lora_A, _B       P L.mlp.experts.lora_A.weight, lora_B
    L.mlp.gate.weight                   L.mlp.gate.weight
    L.mlp.gate.lora_A, lora_B           P L.mlp.gate.lora_A.weight, lora_B
    ...q_proj.base_layer.weight         ...q_proj.weight
    ...q_proj.lora_A.default.weight     P ...q_proj.lora_A.weight

PEFT wraps gate_up_proj first and down_proj around it: the inner one is `base_layer`.
"""

import re

PEFT_PREFIX = "base_model.model."
"""The prefix that PEFT puts before a module's name in an adapter file."""

LAYERS = {"qwen3_vl_moe": "model.language_model.layers.", "qwen3_moe": "model.layers."}
"""The prefix of the decoder layers' names, by the config's `model_type`."""

_OURS_TO_CANONICAL = {
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
    "experts.gate_up_lora_A": "experts.base_layer.lora_A.weight",
    "experts.gate_up_lora_B": "experts.base_layer.lora_B.weight",
    "experts.down_lora_A": "experts.lora_A.weight",
    "experts.down_lora_B": "experts.lora_B.weight",
    "gate.weight": "gate.weight",
    "gate.lora_A": "gate.lora_A.weight",
    "gate.lora_B": "gate.lora_B.weight",
}
_PEFT_TENSOR = re.compile(r"\.(lora_[AB]|lora_embedding_[AB])\.([^.]+)(\.weight)?$")


def canonical_name(model_type: str, name: str, *, adapter: str = "default") -> str:
    """Return the canonical name of our parameter `name`."""
    name = name.removeprefix(PEFT_PREFIX)
    block, tensor = _split(model_type, name)
    if block:
        if tensor not in _OURS_TO_CANONICAL:
            raise ValueError(
                f"{name}: a sparse block of {model_type} has no tensor {tensor!r}; "
                f"it has {', '.join(_OURS_TO_CANONICAL)}"
            )
        canonical = block + _OURS_TO_CANONICAL[tensor]
        return PEFT_PREFIX + canonical if "lora_" in tensor else canonical
    return dense_name(name, adapter=adapter)


def dense_name(name: str, *, adapter: str = "default") -> str:
    """Return the canonical name of a parameter outside sparse blocks: a module that PEFT wrapped keeps its old name."""
    match = _PEFT_TENSOR.search(name)
    if match is None:
        return name.replace(".base_layer.", ".")
    if match[2] != adapter:
        raise ValueError(f"{name}: a tensor of adapter {match[2]!r}, but adapter {adapter!r} is the one being trained")
    return f"{PEFT_PREFIX}{name[: match.start()]}.{match[1]}{match[3] or ''}"


def _split(model_type: str, name: str) -> tuple[str, str]:
    """Return ('<layer>.mlp.', rest) of a tensor in a sparse block, else ('', name)."""
    if model_type not in LAYERS:
        raise ValueError(f"model type {model_type!r} is not supported here; it must be one of {', '.join(LAYERS)}")
    match = re.match(re.escape(LAYERS[model_type]) + r"\d+\.mlp\.(?=experts\.|gate\.)", name)
    return (match[0], name[match.end() :]) if match else ("", name)

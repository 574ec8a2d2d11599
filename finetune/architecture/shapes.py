"""Every parameter of a Qwen3-VL model with its shape, and the resulting counts. Loads no torch.

Names and orientation are those of the model in memory (transformers 5: gate_up_proj [E, 2F, D], down_proj [E, D, F]).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from functools import cache

from finetune.architecture.families import Family, Text, Vision

_FUSED = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")

LANGUAGE = "model.language_model."
VISUAL = "model.visual."
HEAD = "lm_head.weight"
EMBEDDING = LANGUAGE + "embed_tokens.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """The number of parameters of each part. `head` is 0 if it is tied to the embeddings."""

    embeddings: int
    head: int
    attention: int
    experts: int
    router: int
    mlp: int
    norms: int
    vision_blocks: int
    patch_embed: int
    pos_embed: int
    merger: int
    deepstack_mergers: int

    @property
    def total(self) -> int:
        """Return the number of all parameters."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def vision(self) -> int:
        """Return the number of parameters of the tower, its position table, its merger and its DeepStack mergers."""
        return self.vision_blocks + self.patch_embed + self.pos_embed + self.merger + self.deepstack_mergers


def parameter_shapes(family: Family) -> dict[str, Shape]:
    """Return canonical name -> shape of every parameter in a checkpoint; a tied head is absent."""
    return dict(_shapes(family))


@cache
def _shapes(family: Family) -> dict[str, Shape]:
    text, moe_layers = family.text, family.moe_layers
    shapes: dict[str, Shape] = {EMBEDDING: (text.vocab_size, text.hidden_size)}
    for layer in range(text.num_hidden_layers):
        prefix = f"{LANGUAGE}layers.{layer}."
        shapes |= _named(prefix + "self_attn.", _attention(text))
        shapes |= _named(prefix + "mlp.", _experts(text) if layer in moe_layers else _mlp(text))
        shapes[prefix + "input_layernorm.weight"] = (text.hidden_size,)
        shapes[prefix + "post_attention_layernorm.weight"] = (text.hidden_size,)
    shapes[LANGUAGE + "norm.weight"] = (text.hidden_size,)
    shapes |= _named(VISUAL, _tower(family.vision))
    if not family.tie_word_embeddings:
        shapes[HEAD] = (text.vocab_size, text.hidden_size)
    return shapes


@cache
def parameter_counts(family: Family) -> ParameterCounts:
    """Return how the family's parameters divide over its parts; query and key norms count as attention."""
    counts = {field.name: 0 for field in fields(ParameterCounts)}
    for name, shape in parameter_shapes(family).items():
        counts[part_of(name)] += math.prod(shape)
    return ParameterCounts(**counts)


def active_text_parameters(family: Family) -> int:
    """Return the text parameters that one token passes through: its top-k experts and all other parts, head too."""
    counts, experts = parameter_counts(family), family.text.experts
    routed = 0 if experts is None else counts.experts * experts.num_experts_per_tok // experts.num_experts
    head = counts.head or counts.embeddings
    return counts.embeddings + head + counts.attention + routed + counts.router + counts.mlp + counts.norms


def _named(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def _attention(text: Text) -> dict[str, Shape]:
    width, kv_width = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    outputs = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
    shapes: dict[str, Shape] = {f"{name}.weight": (out, text.hidden_size) for name, out in outputs.items()}
    shapes["o_proj.weight"] = (text.hidden_size, width)
    if text.attention_bias:
        shapes |= {f"{name}.bias": (out,) for name, out in outputs.items()}
        shapes["o_proj.bias"] = (text.hidden_size,)
    return shapes | {"q_norm.weight": (text.head_dim,), "k_norm.weight": (text.head_dim,)}


def _experts(text: Text) -> dict[str, Shape]:
    assert text.experts is not None, "moe_layers is empty without experts"
    num, inner = text.experts.num_experts, text.experts.moe_intermediate_size
    return {
        "gate.weight": (num, text.hidden_size),
        "experts.gate_up_proj": (num, 2 * inner, text.hidden_size),
        "experts.down_proj": (num, text.hidden_size, inner),
    }


def _mlp(text: Text) -> dict[str, Shape]:
    return {
        "gate_proj.weight": (text.intermediate_size, text.hidden_size),
        "up_proj.weight": (text.intermediate_size, text.hidden_size),
        "down_proj.weight": (text.hidden_size, text.intermediate_size),
    }


def _tower(vision: Vision) -> dict[str, Shape]:
    width, inner = vision.hidden_size, vision.intermediate_size
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: dict[str, Shape] = {
        "patch_embed.proj.weight": (width, *patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (vision.num_position_embeddings, width),
    }
    block: dict[str, Shape] = {
        **_norm("norm1", width),
        **_norm("norm2", width),
        **_linear("attn.qkv", 3 * width, width),
        **_linear("attn.proj", width, width),
        **_linear("mlp.linear_fc1", inner, width),
        **_linear("mlp.linear_fc2", width, inner),
    }
    for index in range(vision.depth):
        shapes |= _named(f"blocks.{index}.", block)
    merged = width * vision.spatial_merge_size**2
    mlp = _linear("linear_fc1", merged, merged) | _linear("linear_fc2", vision.out_hidden_size, merged)
    # The last merger normalises patches, the DeepStack mergers normalise 2x2 groups.
    shapes |= _named("merger.", _norm("norm", width) | mlp)
    for index in range(len(vision.deepstack_visual_indexes)):
        shapes |= _named(f"deepstack_merger_list.{index}.", _norm("norm", merged) | mlp)
    return shapes


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out: int, into: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def part_of(name: str) -> str:
    """Return the part (a field of ParameterCounts) that a canonical name belongs to."""
    if name.startswith(VISUAL):
        return _VISION_PARTS[name.removeprefix(VISUAL).partition(".")[0]]
    if name == HEAD or name.endswith("embed_tokens.weight"):  # the text-only models have a shorter prefix
        return "head" if name == HEAD else "embeddings"
    if ".self_attn." in name:
        return "attention"
    if ".mlp." in name:
        return "experts" if ".experts." in name else "router" if ".mlp.gate." in name else "mlp"
    return "norms"


_VISION_PARTS = {
    "blocks": "vision_blocks",
    "patch_embed": "patch_embed",
    "pos_embed": "pos_embed",
    "merger": "merger",
    "deepstack_merger_list": "deepstack_mergers",
}


def is_expert_stack(name: str) -> bool:
    """Return whether a canonical name is a stack of all experts' weights, whose first dim is the expert."""
    return bool(_FUSED.search(name))


def other_stack(name: str) -> str:
    """Return the name of the layer's other expert stack: down_proj for gate_up_proj, and the other way round."""
    experts, _, kind = name.rpartition(".")
    return f"{experts}.{'down_proj' if kind == 'gate_up_proj' else 'gate_up_proj'}"

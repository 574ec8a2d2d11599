"""A model's config.json: read in the spelling of the hub or of transformers 5, written in the hub's. Loads no torch.

transformers 5 writes num_experts as num_local_experts, and rope_theta and rope_scaling as one rope_parameters; it
renames the vision tower's model_type and drops norm_topk_prob. Version 4, vLLM and sglang then use class defaults,
which no published model has. So this package writes everything in the hub's spelling.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.architecture.families import Experts, Family, Rope, Text, Vision, family_names
from finetune.architecture.families import family as known_family
from finetune.architecture.family_problems import family_problems
from finetune.files.fp8 import is_fp8
from finetune.files.jsonblock import Block, as_count, as_flag, as_indexes, as_number, as_token, as_word, load_json

TRANSFORMERS_VERSION = "4.57.0.dev0"  # as in the published files; the key does not change how they are read


def read_family(path: Path) -> Family:
    """Read the family that a folder's config.json describes; return the table's entry if one is equal."""
    file = path / "config.json" if path.suffix != ".json" else path
    config = load_json(file)
    is_fp8(config, file)  # other quantisations are refused
    described = _family(Block(file=file, key="", values=config))
    problems = family_problems(described)
    if problems:
        raise ValueError(f"{file} contradicts itself: {'; '.join(problems)}")
    for name in family_names():
        if hub_config(known_family(name)) == hub_config(described):
            return known_family(name)
    return described


def hub_config(family: Family) -> dict[str, Any]:
    """Return the family's config.json in the hub's spelling; for the published sizes it equals the published file."""
    text, vision = family.text, family.vision
    rope, experts = text.rope, text.experts
    text_config: dict[str, Any] = {
        key: getattr(text, key) for key in Text.__dataclass_fields__ if key not in ("experts", "rope")
    }
    text_config["model_type"] = family.model_type + "_text"
    text_config["rope_theta"] = rope.theta
    scaling = {"type": "rope_type"}
    text_config["rope_scaling"] = {
        scaling.get(key, key): _plain(getattr(rope, key))
        for key in Rope.__dataclass_fields__
        if key != "theta" and getattr(rope, key) is not None
    }
    if experts is not None:
        text_config |= {key: _plain(getattr(experts, key)) for key in Experts.__dataclass_fields__}
    if family.tie_word_embeddings:
        text_config["tie_word_embeddings"] = True
    vision_config = {key: _plain(getattr(vision, key)) for key in Vision.__dataclass_fields__}
    vision_config["model_type"] = family.model_type
    return {
        "architectures": [family.architecture],
        "image_token_id": family.image_token_id,
        "model_type": family.model_type,
        "text_config": text_config,
        "tie_word_embeddings": family.tie_word_embeddings,
        "transformers_version": TRANSFORMERS_VERSION,
        "video_token_id": family.video_token_id,
        "vision_config": vision_config,
        "vision_end_token_id": family.vision_end_token_id,
        "vision_start_token_id": family.vision_start_token_id,
    }


def to_hub_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Copy a config.json's object into the hub's spelling; keys that are spelled the same way do not change."""
    config = dict(config)
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    if "num_experts" in text:
        text.setdefault("norm_topk_prob", True)
    rope = text.pop("rope_parameters", None)
    if rope is not None:
        rope = dict(rope)
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
    vision["model_type"] = config["model_type"]
    return config | {"text_config": text, "vision_config": vision}


def config_text(config: dict[str, Any]) -> str:
    """Return the text of a config.json with sorted keys, two spaces and a final newline, like the published files."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _family(root: Block) -> Family:
    model_type = root.get("model_type", as_word)
    if model_type not in ("qwen3_vl", "qwen3_vl_moe"):
        raise ValueError(f"{root.file}: model_type must be qwen3_vl or qwen3_vl_moe, got {model_type!r}")
    text = root.block("text_config")
    outside = [key for key in ("rope_scaling", "rope_parameters", "rope_theta") if key in root.values]
    if outside:
        raise ValueError(
            f"{root.file}: {outside[0]} is at the top level, where the text model does not read it. Move it into "
            f"text_config"
        )
    return Family(
        name=(root.file.parent if root.file.name == "config.json" else root.file).name,
        text=_text(text, moe=model_type == "qwen3_vl_moe"),
        vision=_vision(root.block("vision_config")),
        # The root's value decides, as in transformers; the class default of the text block would tie every MoE head.
        tie_word_embeddings=root.get("tie_word_embeddings", as_flag, default=False),
        **{key: root.get(key, as_token, default=default) for key, default in _TOKENS.items()},
    )


def _text(text: Block, *, moe: bool) -> Text:
    defaults: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "hidden_act": (as_word, "silu"),
        "attention_bias": (as_flag, False),
        "attention_dropout": (as_number, 0.0),
        "initializer_range": (as_number, 0.02),
        "bos_token_id": (as_token, 151_643),
        "eos_token_id": (as_token, 151_645),
        "use_cache": (as_flag, True),
        "dtype": (as_word, "bfloat16"),
    }
    return Text(
        rope=_rope(text),
        experts=_experts(text) if moe else None,
        rms_norm_eps=text.get("rms_norm_eps", as_number),
        **{key: text.get(key, as_count) for key in _TEXT_SIZES},
        **{key: text.get(key, kind, default=default) for key, (kind, default) in defaults.items()},
    )


def _experts(text: Block) -> Experts:
    return Experts(
        num_experts=text.get("num_experts", as_count, instead="num_local_experts"),
        num_experts_per_tok=text.get("num_experts_per_tok", as_count),
        moe_intermediate_size=text.get("moe_intermediate_size", as_count),
        norm_topk_prob=text.get("norm_topk_prob", as_flag, default=True),  # transformers 5 drops it when it saves
        decoder_sparse_step=text.get("decoder_sparse_step", as_count, default=1),
        mlp_only_layers=text.get("mlp_only_layers", as_indexes, default=()),
    )


def _rope(text: Block) -> Rope:
    _refuse_two_ropes(text)
    block = text.block("rope_parameters" if "rope_parameters" in text.values else "rope_scaling")
    unknown = sorted(set(block.values) - set(_ROPE_KEYS))
    if unknown:
        raise ValueError(
            f"{text.file}: {block.key}{unknown[0]} would be ignored; the known keys are {', '.join(_ROPE_KEYS)}"
        )
    holder = block if "rope_theta" in block.values else text
    yarn = {
        "factor": block.get("factor", as_number) if "factor" in block.values else None,
        "original_max_position_embeddings": block.get("original_max_position_embeddings", as_count)
        if "original_max_position_embeddings" in block.values
        else None,
    }
    return Rope(
        theta=holder.get("rope_theta", as_number),
        mrope_section=block.get("mrope_section", as_indexes),
        mrope_interleaved=block.get("mrope_interleaved", as_flag),
        type=block.get("rope_type", as_word, instead="type"),
        **yarn,
    )


def _refuse_two_ropes(text: Block) -> None:
    """Raise ValueError if blocks of both spellings differ: readers use different ones, and some then lose theta."""
    both = [text.values.get(key) for key in ("rope_scaling", "rope_parameters")]
    if not all(both):
        return
    theta = text.values.get("rope_theta")
    hub, v5 = ({**block, "rope_theta": block.get("rope_theta", theta)} for block in both if block)
    different = sorted(key for key in hub.keys() | v5.keys() if hub.get(key) != v5.get(key))
    if different:
        raise ValueError(
            f"{text.file}: text_config.rope_scaling and rope_parameters differ in {', '.join(different)}; readers "
            f"would use different ones. Make them equal, with rope_theta in rope_parameters and next to rope_scaling"
        )
    if theta is None:
        raise ValueError(
            f"{text.file}: text_config has rope_scaling but no rope_theta next to it: transformers would then use its "
            f"default, 500000. Add rope_theta next to rope_scaling"
        )


def _vision(vision: Block) -> Vision:
    return Vision(
        deepstack_visual_indexes=vision.get("deepstack_visual_indexes", as_indexes),
        hidden_act=vision.get("hidden_act", as_word, default="gelu_pytorch_tanh"),
        initializer_range=vision.get("initializer_range", as_number, default=0.02),
        **{key: vision.get(key, as_count) for key in _VISION_SIZES},
    )


_ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "mrope_section",
    "mrope_interleaved",
    "factor",
    "original_max_position_embeddings",
)
_TOKENS = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
_TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_VISION_SIZES = (
    "out_hidden_size",
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_position_embeddings",
)

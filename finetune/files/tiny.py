"""A small base model with random weights in the hub's layout: all files of a real folder, in a few hundred KB."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.architecture.families import Experts, Family, Rope, Text, Vision
from finetune.architecture.family_problems import family_problems
from finetune.architecture.shapes import EMBEDDING, Shape, is_expert_stack, parameter_shapes
from finetune.files.fp8 import is_quantised, kept_modules, quantization_config
from finetune.files.hubconfig import hub_config
from finetune.files.hubfiles import added_token_ids, side_files
from finetune.files.layouts import HUB_METADATA, LAYOUT_KEY, Layout, single_expert, stored_shapes
from finetune.files.tensorfile import FP8, TYPE_NAMES
from finetune.files.vocabulary import Vocabulary, qwen3_vocabulary, tiny_vocabulary
from finetune.files.writer import SHARD_BYTES, WrittenModel, write_model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """The dimensions of a tiny model. All defaults differ, so that tests notice a swapped dim.

    `experts` is None for a dense model. In expert layers D is `hidden`, F is `expert_hidden`.
    """

    experts: int | None = 8
    top_k: int = 2
    expert_hidden: int = 40
    hidden: int = 48
    intermediate: int = 88
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vision_depth: int = 4
    vision_hidden: int = 24
    vision_intermediate: int = 56
    vision_heads: int = 2
    max_positions: int = 4096
    image_min_tokens: int = 64
    tokenizer: Literal["tiny", "qwen3"] = "tiny"
    vocabulary: int | None = None
    """Rows of embedding and head; None: one for each token, and some that no token uses."""
    dtype: str = "float32"
    fp8: Literal["", "stacked", "per-expert"] = ""
    """The layout of experts in fp8; "": no weight is in fp8. The other weights have `dtype`."""
    tied: bool = False
    seed: int = 0
    shard_bytes: int = SHARD_BYTES


def write_tiny(folder: Path, model: TinyModel = TinyModel()) -> WrittenModel:
    """Write the folder of a tiny model. The same arguments give the same bytes, with the same library versions."""
    vocabulary = _vocabulary(model)
    family = tiny_family(model, vocabulary)
    shapes = parameter_shapes(family)
    layout: Layout = "per_expert" if model.fp8 == "per-expert" else "hub"
    stored = stored_shapes(shapes, "per_expert") if layout == "per_expert" else shapes
    types = {
        name: FP8 if model.fp8 and is_quantised(name, shape) else TYPE_NAMES[model.dtype]
        for name, shape in stored.items()
    }
    quantised = {"quantization_config": quantization_config(kept_modules(types, stored))} if model.fp8 else {}
    return write_model(
        folder,
        _weights(model, shapes, layout, types),
        shapes=stored,
        dtypes=types,
        config=hub_config(family) | quantised,
        side_files={
            **side_files(family, vocabulary.base_size, image_min_tokens=model.image_min_tokens),
            **vocabulary.files,
        },
        shard_bytes=model.shard_bytes,
        metadata=HUB_METADATA | {LAYOUT_KEY: layout},
    )


def _weights(
    model: TinyModel, shapes: dict[str, Shape], layout: Layout, types: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights under the names of a layout, in the type that the writer takes them in."""
    for name, tensor in random_weights(shapes, dtype=model.dtype, seed=model.seed):
        if layout == "per_expert" and is_expert_stack(name):
            for expert, matrix in enumerate(tensor):
                keys = [key for key, _ in single_expert(name, shapes[name], expert)]
                parts = zip(keys, matrix.chunk(len(keys)), strict=True)
                yield from ((key, part.float() if types[key] == FP8 else part) for key, part in parts)
        else:
            yield name, tensor.float() if types[name] == FP8 else tensor


def tiny_family(model: TinyModel, vocabulary: Vocabulary) -> Family:
    """Return the family of a tiny model; raise one ValueError that lists every wrong option."""
    token = added_token_ids(vocabulary.base_size)
    half = max(model.head_dim // 2, 0)
    side = half * 20 // 64  # the shares in the real models are 24, 20 and 20 of 64
    experts = None
    if model.experts is not None:
        experts = Experts(
            num_experts=model.experts, num_experts_per_tok=model.top_k, moe_intermediate_size=model.expert_hidden
        )
    family = Family(
        name="tiny",
        text=Text(
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
            vocab_size=_padded(vocabulary.size) if model.vocabulary is None else model.vocabulary,
            max_position_embeddings=model.max_positions,
            experts=experts,
            rope=Rope(mrope_section=(half - 2 * side, side, side)),
            bos_token_id=token["<|endoftext|>"],
            eos_token_id=token["<|im_end|>"],
            dtype=model.dtype,
        ),
        vision=Vision(
            out_hidden_size=model.hidden,
            depth=model.vision_depth,
            hidden_size=model.vision_hidden,
            intermediate_size=model.vision_intermediate,
            num_heads=model.vision_heads,
            deepstack_visual_indexes=_deepstack(model),
            num_position_embeddings=64,
        ),
        tie_word_embeddings=model.tied,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )
    problems = _option_problems(model, vocabulary) or family_problems(family)
    if problems:
        raise ValueError("a tiny model cannot have these dimensions:\n  " + "\n  ".join(problems))
    return family


def random_weights(shapes: dict[str, Shape], *, dtype: str, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield canonical names and weights one at a time, each from a generator of its own.

    They are scaled by fan-in. The real models' 0.02 would give outputs close to zero at these widths, and a test could
    not tell a wrong expert from a right one.
    """
    import torch

    for name, shape in shapes.items():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values.mul_(0.05)
            if name.endswith("norm.weight") or name.endswith(("norm1.weight", "norm2.weight")):
                values.add_(1)
        elif name == EMBEDDING or name.endswith("pos_embed.weight"):
            values.mul_(shape[1] ** -0.5)
        else:
            # [out, in, ...]; in an expert stack [E, out, in] the fan-in is that of one expert's matrix.
            fan_in = shape[2] if ".experts." in name else math.prod(shape[1:])
            values.mul_(fan_in**-0.5)
        yield name, values.to(getattr(torch, dtype))


def _vocabulary(model: TinyModel) -> Vocabulary:
    if model.tokenizer not in ("tiny", "qwen3"):
        raise ValueError(f"--tokenizer must be tiny or qwen3, got {model.tokenizer!r}")
    return qwen3_vocabulary() if model.tokenizer == "qwen3" else tiny_vocabulary()


def _padded(tokens: int) -> int:
    """Return a vocabulary size with some rows that no token uses, as in the real models: 151,936 for 151,669 tokens."""
    return 151_936 if tokens == 151_669 else -(-(tokens + 1) // 64) * 64


def _deepstack(model: TinyModel) -> tuple[int, ...]:
    """Return up to three of the tower's last blocks, at most one per text layer."""
    taps = max(min(3, model.layers, model.vision_depth), 0)
    return tuple(range(model.vision_depth - taps, model.vision_depth))


def _option_problems(model: TinyModel, vocabulary: Vocabulary) -> list[str]:
    problems = []
    if model.vocabulary is not None and 1 <= model.vocabulary < vocabulary.size:
        problems.append(
            f"--vocabulary must be at least {vocabulary.size}, the number of tokens in the tokenizer, got "
            f"{model.vocabulary}"
        )
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and field.name != "seed" and value < 1:
            problems.append(f"--{field.name.replace('_', '-')} must be at least 1, got {value}")
    if model.head_dim % 2 or model.head_dim < 8:
        problems.append(
            f"--head-dim must be an even number of 8 or more, for its three rotary sections, got {model.head_dim}"
        )
    if model.dtype not in TYPE_NAMES:
        problems.append(f"--dtype must be one of {', '.join(TYPE_NAMES)}, got {model.dtype!r}")
    if model.experts is not None:
        hidden, expert_hidden = model.hidden, model.expert_hidden
        if hidden in (expert_hidden, 2 * expert_hidden):
            problems.append(
                f"--hidden {hidden} with --expert-hidden {expert_hidden}: transposed experts would have the same "
                f"shape, and no reader could tell the two layouts apart; --hidden must differ from --expert-hidden and "
                f"from twice --expert-hidden"
            )
    return problems

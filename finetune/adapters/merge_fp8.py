"""The types of a merged folder, and tensors written in fp8: codes and scales of the float32 sum, and their distance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.architecture.shapes import Shape, is_expert_stack
from finetune.files.basefiles import BaseFiles
from finetune.files.fp8 import BLOCK, SCALE, dequantise, is_quantised, kept_modules, quantise, quantization_config
from finetune.files.tensorfile import FLOAT_TYPES, FP8, raw_bytes
from finetune.ranks.log import listed

TYPES = {"bfloat16": "BF16", "float32": "F32", "fp8": FP8}
"""The type of the weights for each value of `--dtype`; what fp8 leaves out is written in bfloat16."""

Piece = tuple[str, memoryview]
"""The next bytes of a stored tensor, with its key."""


@dataclass(kw_only=True)
class Quantised:
    """The distance of one tensor's fp8 values from the float32 sum: sums of squares over all its values."""

    weight_square: float = 0.0
    error_square: float = 0.0

    @property
    def error(self) -> float:
        """The relative error of the weights."""
        return math.sqrt(self.error_square / self.weight_square) if self.weight_square else 0.0


def merged_types(base: BaseFiles, dtype: str | None) -> dict[str, str]:
    """Return the type of each tensor in the merged folder by canonical name; without `dtype` they are the base's.

    Raise ValueError if fp8 is asked for sizes that servers do not read alike.
    """
    if dtype is not None and dtype not in TYPES:
        raise ValueError(f"--dtype must be one of {', '.join(TYPES)}, got {dtype!r}")
    types = base.dtypes
    if dtype == "fp8":
        types = {
            name: FP8 if types[name] == FP8 or is_quantised(name, shape) else "BF16"
            for name, shape in base.shapes.items()
        }
    elif dtype is not None:
        types = dict.fromkeys(base.shapes, TYPES[dtype])
    wrong = [name for name, shape in base.shapes.items() if types[name] == FP8 and any(n % BLOCK for n in shape[-2:])]
    if wrong:
        shown = listed([f"{name} {list(base.shapes[name])}" for name in wrong], 3)
        raise ValueError(
            f"an fp8 folder needs matrices whose sizes {BLOCK} divides, because vLLM and transformers place the blocks "
            f"of others differently: {shown}. Write another type: --dtype bfloat16"
        )
    return types


def typed_config(
    config: Mapping[str, Any], dtype: str | None, types: Mapping[str, str], shapes: Mapping[str, Shape]
) -> dict[str, Any]:
    """Return a config.json that names the types of the merged folder; without `dtype` nothing changes."""
    if dtype is None:
        return dict(config)
    word = FLOAT_TYPES["BF16" if dtype == "fp8" else TYPES[dtype]]

    def named(block: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: word if key in ("dtype", "torch_dtype") else named(value) if isinstance(value, dict) else value
            for key, value in block.items()
            if key != "quantization_config"
        }

    block = {"quantization_config": quantization_config(kept_modules(types, shapes))} if dtype == "fp8" else {}
    return named(config) | block


def quantised_pieces(name: str, blocks: Iterable[Tensor], loss: Quantised) -> Iterator[Piece]:
    """Yield the codes of float32 blocks, then the scales; only the last block of a matrix may end within 128 rows."""
    scales = []
    for values in blocks:
        codes, block_scales = quantise(values)
        yield name, raw_bytes(codes)
        scales.append(block_scales)
        weights = values.reshape(-1)
        apart = dequantise(codes, block_scales).view(-1).sub_(weights)
        loss.weight_square += float(torch.dot(weights, weights))
        loss.error_square += float(torch.dot(apart, apart))
    yield name + SCALE, raw_bytes(torch.cat(scales))
    if not math.isfinite(loss.weight_square + loss.error_square):
        raise ValueError(
            f"{name}: a weight to be quantised is not finite; the base or the adapter holds NaN or infinity. Nothing "
            f"was written"
        )


def copied_pieces(base: BaseFiles, name: str, shape: Shape) -> Iterator[Piece]:
    """Yield the codes of an fp8 tensor that does not change, then its scales; a stack comes one matrix at a time."""
    scales = []
    for expert in range(shape[0]) if is_expert_stack(name) else (None,):
        codes, matrix_scales = base.codes(name, expert)
        yield name, raw_bytes(codes)
        scales.append(matrix_scales)
    yield name + SCALE, raw_bytes(torch.cat(scales))

"""Weights in fp8 (e4m3) with a scale for each block of 128 x 128: their names and shapes, and the arithmetic.

A tensor `NAME` of codes has its scales in `NAME_scale_inv`: a weight is its code times the scale of its block. Blocks
count from the first row and column of each stored matrix, and the last ones may be smaller. In a stack of experts
every matrix has its own blocks. Published FP8 folders, vLLM and sglang use these names. Loads no torch at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.architecture.shapes import Shape, part_of
from finetune.files.tensorfile import FP8, FP8_VALUES, ITEM_SIZES, Stored, numpy_values, read_bytes

if TYPE_CHECKING:
    import torch

BLOCK = 128
LARGEST = 448.0
"""The largest value of e4m3."""
SCALE = "_scale_inv"
FORM = "fp8 (e4m3 in blocks of 128 x 128)"
_PARTS = ("attention", "experts", "mlp")


def scale_shape(shape: Shape) -> Shape:
    """Return the shape of the scales of a stored tensor: its last two dims in blocks."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def is_quantised(name: str, shape: Shape) -> bool:
    """Return whether a canonical tensor is fp8 in a folder of this form: the text layers' matrices, but no router."""
    return len(shape) > 1 and part_of(name) in _PARTS


def with_scales(kinds: Mapping[str, tuple[str, Shape]]) -> dict[str, tuple[str, Shape]]:
    """Return stored tensors, (dtype, shape) by name, with the scales behind each fp8 tensor."""
    every: dict[str, tuple[str, Shape]] = {}
    for name, (dtype, shape) in kinds.items():
        every[name] = (dtype, shape)
        if dtype == FP8:
            every[name + SCALE] = ("F32", scale_shape(shape))
    return every


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the scales of a float32 matrix; a block's largest value becomes the largest code."""
    import torch

    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scale_shape(tuple(values.shape)))
    columns = values.shape[1]
    padded = torch.zeros(scales.shape[1] * BLOCK)
    for group, rows in enumerate(torch.split(values, BLOCK)):
        padded[:columns] = rows.abs().amax(0)
        scale = padded.view(-1, BLOCK).amax(1).div_(LARGEST)
        scale.masked_fill_(scale == 0, 1.0)  # a block of zeros
        scales[group] = scale
        wide = scale.repeat_interleave(BLOCK)[:columns]
        codes[group * BLOCK : group * BLOCK + len(rows)] = (rows / wide).clamp_(-LARGEST, LARGEST)
    return codes, scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return the float32 values of rows of a matrix, of which the first has this number in the first scale's block."""
    import torch

    # about five times faster than torch's conversion
    values = torch.from_numpy(np.take(FP8_VALUES, codes.view(torch.uint8).numpy(), mode="clip"))
    wide = scales.to(torch.float32).repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
    at = 0
    for group in wide:
        end = min(at + BLOCK - (first if at == 0 else 0), len(values))
        values[at:end] *= group
        at = end
    return values


def quantization_config(kept: Iterable[str]) -> dict[str, Any]:
    """Return the block of config.json that names the form, and the modules that are not in it."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(kept),
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def kept_modules(types: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[str]:
    """Return the modules that a folder with these types by canonical name does not hold in fp8; readers need all."""
    matrices = {name for name, shape in shapes.items() if len(shape) > 1 and types[name] != FP8}
    return sorted({name.removesuffix(".weight") for name in matrices} | {"lm_head"})


def is_fp8(config: Mapping[str, Any], file: Path) -> bool:
    """Return whether a config.json describes a base of this form; raise ValueError for every other quantisation."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    block = config.get("quantization_config") or nested
    if block is None:
        return False
    method = block.get("quant_method", "unknown") if isinstance(block, Mapping) else str(block)
    if method != "fp8":
        raise ValueError(
            f"{file}: the base is quantised by {method} (quantization_config.quant_method), which cannot be read. A "
            f"base may be unquantised or {FORM}; use the original checkpoint, or its FP8 release"
        )
    for key, allowed, default in (("weight_block_size", [BLOCK, BLOCK], None), ("fmt", "e4m3", "e4m3")):
        if block.get(key, default) != allowed:
            raise ValueError(
                f"{file}: quantization_config.{key} is {block.get(key)!r}; of fp8 bases only {FORM} can be read, so it "
                f"must be {allowed!r}. Use the original checkpoint"
            )
    return True


def require_sound_scales(scales: Iterable[Stored]) -> None:
    """Read scales from the disk, and raise ValueError for the first tensor with one that is no positive number."""
    handles: dict[Path, int] = {}
    with ExitStack() as stack:
        for scale in scales:
            if scale.file not in handles:
                handles[scale.file] = os.open(scale.file, os.O_RDONLY)
                stack.callback(os.close, handles[scale.file])
            raw = bytearray(scale.size)
            read_bytes(handles[scale.file], scale, memoryview(raw), 0)
            require_sound(scale, numpy_values(bytes(raw), scale.dtype))


def require_sound(scale: Stored, values: Any) -> None:
    """Raise ValueError unless all these values of a tensor of scales are finite and above 0."""
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        raise ValueError(
            f"{scale.file}: {scale.name} holds the scale {values[wrong].flat[0]}; a scale must be a finite number "
            f"above 0. The file is damaged; fetch it again"
        )


def value_at(codes: Stored, scale: Stored, item: int, handle: int, scale_handle: int) -> bytes:
    """Return one value of an fp8 tensor, given its flat index in the stored codes, as the bytes of a float32."""
    rows, columns = codes.shape[-2:]
    matrix, rest = divmod(item, rows * columns)
    row, column = divmod(rest, columns)
    high, across = scale.shape[-2:]
    place = matrix * high * across + row // BLOCK * across + column // BLOCK
    size = ITEM_SIZES[scale.dtype]
    code = numpy_values(os.pread(handle, 1, codes.begin + item), FP8)
    factor = numpy_values(os.pread(scale_handle, size, scale.begin + place * size), scale.dtype)
    return bytes((code * factor).astype("<f4").tobytes())

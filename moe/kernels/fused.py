"""Triton kernels that turn rows of bytes into matrices: one pass over memory, where torch needs about ten.

Loaded only on CUDA, where torch brings Triton along. The arithmetic is that of `int8` and `nf4`, operation by
operation, so the values are the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.nf4 import code_table, scale_table
from moe.kernels.packed import BLOCK, FLOAT, SCALE_BLOCK, Packing

BLOCKS = 32
"""Blocks of scales that one program of the nf4 kernel takes."""
COLUMNS = 1024
"""Weights of a row that one program of the int8 kernel takes."""


@triton.jit
def nf4_kernel(
    bytes_ptr,
    floats_ptr,
    code_ptr,
    scale_ptr,
    out_ptr,
    row_bytes,
    weights,
    out_stride,
    line_stride,
    INTO: tl.constexpr,
    SCALE_CODES: tl.constexpr,
    SCALES: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Fill `BLOCKS` blocks of one matrix; SCALE_CODES counts bytes of a row, SCALES and OFFSET count floats."""
    matrix = tl.program_id(1).to(tl.int64)
    row = bytes_ptr + matrix * row_bytes
    floats = floats_ptr + matrix * (row_bytes // 4)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block * BLOCK < weights
    scale_code = tl.load(row + SCALE_CODES + block, mask=there, other=0).to(tl.int32)
    each = tl.load(floats + SCALES + block // SCALE_BLOCK, mask=there, other=0.0)
    scale = tl.load(scale_ptr + scale_code) * each + tl.load(floats + OFFSET)
    pair = tl.arange(0, BLOCK // 2)
    place = block[:, None] * (BLOCK // 2) + pair[None, :]
    packed = tl.load(row + place, mask=place * 2 < weights, other=0).to(tl.int32)
    high = tl.load(code_ptr + (packed >> 4))
    low = tl.load(code_ptr + (packed & 15))
    values = tl.join(high, low).reshape(BLOCKS, BLOCK) * scale[:, None]
    weight = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    target = out_ptr + matrix * out_stride + (weight // INTO) * line_stride + weight % INTO
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=weight < weights)


@triton.jit
def int8_kernel(
    codes_ptr,
    floats_ptr,
    out_ptr,
    row_bytes,
    out_stride,
    line_stride,
    INTO: tl.constexpr,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Fill `COLUMNS` weights of one output row of one matrix; SCALES counts floats of a row of bytes."""
    line = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    codes = tl.load(codes_ptr + matrix * row_bytes + line * INTO + column, mask=column < INTO, other=0)
    scale = tl.load(floats_ptr + matrix * (row_bytes // 4) + SCALES + line)
    values = codes.to(tl.float32) * scale
    target = out_ptr + matrix * out_stride + line * line_stride + column
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=column < INTO)


def unpack(packing: Packing, packed: Tensor, into: Tensor) -> None:
    """Fill `into` [n, out, into], whose rows may be spaced, from rows of bytes [n, bytes]."""
    assert packed.is_contiguous()
    assert into.stride(2) == 1
    floats = packed.view(torch.float32)
    begins = packing.begins
    common: dict[str, Any] = {"INTO": packing.into, "enable_fp_fusion": False}  # a fused multiply-add rounds once less
    strides = (packing.row_bytes, into.stride(0), into.stride(1))
    if packing.bits == "int8":
        grid = (triton.cdiv(packing.into, COLUMNS), packing.out, len(packed))
        int8_kernel[grid](
            packed.view(torch.int8), floats, into, *strides, SCALES=begins[1] // FLOAT, COLUMNS=COLUMNS, **common
        )
        return
    nf4_kernel[triton.cdiv(packing.weights, BLOCK * BLOCKS), len(packed)](
        packed,
        floats,
        code_table(packed.device),
        scale_table(packed.device),
        into,
        packing.row_bytes,
        packing.weights,
        *strides[1:],
        SCALE_CODES=begins[1],
        SCALES=begins[2] // FLOAT,
        OFFSET=begins[3] // FLOAT,
        BLOCK=BLOCK,
        SCALE_BLOCK=SCALE_BLOCK,
        BLOCKS=BLOCKS,
        **common,
    )

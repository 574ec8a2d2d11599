"""A frozen matrix as one row of bytes: its codes, then its scales.

A stack of matrices is one uint8 tensor [matrices, bytes]. So it is a single tensor to load, hold as a buffer or
partition, which no engine casts; and the bytes of a matrix are the same however a stack is cut. Loading torch is left
to the functions that compute, because the planner needs the sizes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Bits = Literal["int8", "nf4"]
FLOAT = 4
"""Bytes of a scale."""
ALIGN = 16
"""The row of a matrix is a multiple of this long, so that its scales can be read as float32 and loads can be wide."""
BLOCK = 64
"""Weights of a block in nf4."""
SCALE_BLOCK = 256
"""Blocks whose scales share a scale."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The layout of the bytes of a stack of matrices [out, into]."""

    bits: Bits
    out: int
    into: int

    @property
    def weights(self) -> int:
        """Return the elements of one matrix."""
        return self.out * self.into

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of each field of a row: codes and scales; in nf4 codes, scale codes, scales and offset."""
        if self.bits == "int8":
            return [self.weights, FLOAT * self.out]
        blocks = -(-self.weights // BLOCK)
        return [self.weights // 2, blocks, FLOAT * -(-blocks // SCALE_BLOCK), FLOAT]

    @property
    def begins(self) -> list[int]:
        """Return the place of each field in a row."""
        return [0, *accumulate(-(-size // ALIGN) * ALIGN for size in self.sizes[:-1])]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one matrix."""
        return sum(-(-size // ALIGN) * ALIGN for size in self.sizes)

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of one weight, with its share of the scales."""
        return 8 * self.row_bytes / self.weights

    def pack(self, matrices: Tensor, *, name: str) -> Tensor:
        """Return matrices [n, out, into] as rows of bytes, each quantised by itself; `name` is for errors."""
        import torch

        from moe.kernels import int8, nf4

        quantise = int8.quantise if self.bits == "int8" else nf4.quantise
        packed = torch.zeros((len(matrices), self.row_bytes), dtype=torch.uint8, device=matrices.device)
        for row, matrix in zip(packed, matrices, strict=True):
            wide = matrix.float()
            if not wide.isfinite().all():
                raise ValueError(
                    f"{name} holds a value that is not finite, which cannot be quantised to {self.bits}. Fetch the "
                    f"file again (`moetune verify-base` checks a folder), or set model.quantise to none"
                )
            for field, values in zip(self._fields(row), quantise(wide), strict=True):
                field.copy_(values.flatten().view(torch.uint8))
        return packed

    def unpack(self, packed: Tensor, into: Tensor) -> Tensor:
        """Fill `into` [n, out, into], in which rows may be spaced, and return it.

        Without the fused kernel, matrices are unpacked one by one, so that what lies between codes and values is as
        large as one of them.
        """
        import torch

        from moe.kernels import int8, nf4

        if packed.is_cuda and has_triton():
            from moe.kernels import fused

            fused.unpack(self, packed, into)
            return into
        codes, *rest = self._fields(packed)
        if self.bits == "int8":
            codes = codes.view(torch.int8).view(*packed.shape[:-1], self.out, self.into)
            scales = rest[0].view(torch.float32)
        else:
            scales = nf4.block_scales(rest[0], *(field.view(torch.float32) for field in rest[1:]))
        dequantise = int8.dequantise if self.bits == "int8" else nf4.dequantise
        for matrix, code, scale in zip(into, codes, scales, strict=True):
            dequantise(code, scale, matrix)
        return into

    def _fields(self, packed: Tensor) -> list[Tensor]:
        """Return the fields of rows [..., bytes] as views."""
        return [packed[..., begin : begin + size] for begin, size in zip(self.begins, self.sizes, strict=True)]


@cache
def has_triton() -> bool:
    """Say whether Triton is installed; torch for CUDA brings it along."""
    return find_spec("triton") is not None

"""The arithmetic of a merge: blocks of a base tensor plus their part of the change, in float32, rounded once.

A block is small enough to stay in the processor's cache during the computation. All arithmetic uses the orientation of
the output file, so that the hub's transposed expert stacks need no transposition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.adapters.change import Change
from finetune.architecture.shapes import Shape, is_expert_stack
from finetune.files.basefiles import BaseFiles
from finetune.files.fp8 import BLOCK as SIDE
from finetune.files.tensorfile import FP8, read_bytes, torch_type

BLOCK = 1 << 18
"""Values per block: two float32 buffers of 1 MiB, and the block twice in its own type.

With smaller blocks, threads wait for the interpreter; larger blocks exceed the cache.
"""


@dataclass(kw_only=True)
class Realised:
    """The loss of one tensor's change to rounding: counts and sums of squares over all its values."""

    values: int = 0
    unchanged: int = 0
    intended_square: float = 0.0
    error_square: float = 0.0

    @property
    def intended(self) -> float:
        """The norm of the change that the adapter specifies."""
        return math.sqrt(self.intended_square)

    @property
    def error(self) -> float:
        """The relative error of the change in the file: 0 is exact, 1 is lost."""
        return math.sqrt(self.error_square / self.intended_square) if self.intended_square else 0.0

    @property
    def lost(self) -> bool:
        """Return whether rounding removed the change completely."""
        return self.intended_square > 0 and self.unchanged == self.values


@dataclass(frozen=True, kw_only=True)
class Block:
    """A lane's buffers as one block: made once per shape, because creating views costs as much as the arithmetic."""

    values: Tensor
    """The base's values [rows, columns], read through `raw`; `out` has the type of the merged file."""
    raw: Any
    flat: Tensor
    out: Tensor
    out_raw: Any
    total: Tensor
    total_rc: Tensor
    other: Tensor
    other_rc: Tensor
    bits: Any
    out_bits: Any
    out_bits_type: torch.dtype
    differs: Any

    def add(self, left: Tensor, right: Tensor, realised: Realised) -> None:
        """Set `out` to values + left @ right, rounded once, and record the rounding in `realised`."""
        total, other = self.total, self.other
        if self.flat.dtype == self.out.dtype == torch.float32:  # the addition itself is the only rounding
            torch.mm(left, right, out=self.other_rc)
            torch.add(self.flat, other, out=self.out)
            torch.sub(self.out, self.flat, out=total).sub_(other)
        else:
            self.out.copy_(self.sum(left, right).view(-1))
            total.sub_(other.copy_(self.out))
        count = len(self.differs)
        bits = self.bits
        if self.flat.dtype != self.out.dtype:  # without the change, the base's values would be rounded too
            bits = self.flat.to(self.out.dtype).view(self.out_bits_type).numpy()
        np.not_equal(bits, self.out_bits, out=self.differs)  # several times faster than torch here
        realised.error_square += float(torch.dot(total, total))
        realised.values += count
        realised.unchanged += count - int(np.count_nonzero(self.differs))

    def sum(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Return values + left @ right in float32; without factors, the values."""
        self.total.copy_(self.flat)
        return self.total_rc if left is None or right is None else self.total_rc.addmm_(left, right)

    def converted(self) -> Any:
        """Return the bytes of the values in the type of the merged file."""
        if self.flat.dtype == self.out.dtype:
            return self.raw
        self.out.copy_(self.flat)
        return self.out_raw


class Lane:
    """The buffers of one thread."""

    def __init__(self, widest_row: int) -> None:
        self.size = max(BLOCK, widest_row)
        self._read, self._rounded = (torch.empty(4 * self.size, dtype=torch.uint8) for _ in range(2))
        self._total, self._other = torch.empty(self.size), torch.empty(self.size)
        self._differs = np.empty(self.size, dtype=bool)
        self._blocks: dict[tuple[int, int, torch.dtype, torch.dtype], Block] = {}

    def block(self, rows: int, columns: int, dtype: torch.dtype, out: torch.dtype) -> Block:
        """Return the buffers as a block of this shape; all blocks of a lane share them."""
        key = (rows, columns, dtype, out)
        if key not in self._blocks:
            count = rows * columns
            read, rounded = self._read[: count * dtype.itemsize], self._rounded[: count * out.itemsize]
            bits = {kind: torch.int32 if kind.itemsize == 4 else torch.int16 for kind in (dtype, out)}
            total, other = self._total[:count], self._other[:count]
            self._blocks[key] = Block(
                values=read.view(dtype).view(rows, columns),
                raw=read.numpy().data,
                flat=read.view(dtype),
                out=rounded.view(out),
                out_raw=rounded.numpy().data,
                total=total,
                total_rc=total.view(rows, columns),
                other=other,
                other_rc=other.view(rows, columns),
                bits=read.view(bits[dtype]).numpy(),
                out_bits=rounded.view(bits[out]).numpy(),
                out_bits_type=bits[out],
                differs=self._differs[:count],
            )
        return self._blocks[key]


def intended_square(left_Eor: Tensor, right_Eri: Tensor) -> float:
    """Return the squared norm of left @ right over all matrices, computed from r x r products only."""
    grams = (left_Eor.transpose(1, 2) @ left_Eor).double() * (right_Eri @ right_Eri.transpose(1, 2)).double()
    return max(float(grams.sum()), 0.0)


def factors(change: Change) -> tuple[Tensor, Tensor]:
    """Return (left [E, rows, r], right [E, r, columns]) in float32, scale included, in the files' orientation."""
    a_Eri, b_Eor = change.read()
    b_Eor = b_Eor.float().mul_(change.scale) if b_Eor.dtype != torch.float32 else b_Eor * change.scale
    if is_expert_stack(change.target):  # the hub has [E, in, out]
        return a_Eri.float().transpose(1, 2).contiguous(), b_Eor.transpose(1, 2).contiguous()
    return b_Eor.contiguous(), a_Eri.float().contiguous()


def blocks(base: BaseFiles, name: str, stored: Shape, lane: Lane, kind: str) -> Iterator[tuple[int, range, Block]]:
    """Yield the blocks of a tensor in the order and orientation of the output file, with their matrix and rows.

    `kind` is the type in that file. Each block overwrites the one before.
    """
    experts = stored[0] if is_expert_stack(name) else 1
    matrix = stored[1:] if is_expert_stack(name) else stored
    rows, columns = matrix[0], math.prod(matrix[1:])
    least = SIDE if kind == FP8 else 1
    step = max(least, lane.size // columns // least * least)
    out = torch.float32 if kind == FP8 else torch_type(kind)
    if name in base.scales or (is_expert_stack(name) and base.layout != "hub"):
        for expert in range(experts):
            whole = base.read(name, range(expert, expert + 1))[0].t() if is_expert_stack(name) else None
            for first in range(0, rows, step):
                places = range(first, min(first + step, rows))
                part = base.read(name, places) if whole is None else whole[first : places.stop]
                block = lane.block(len(places), columns, part.dtype, out)
                block.values.copy_(part)
                yield expert, places, block
        return
    tensor = base.stored[name]
    dtype = torch_type(tensor.dtype)
    begin = 0
    with tensor.file.open("rb", buffering=0) as file:
        for expert in range(experts):
            for first in range(0, rows, step):
                block = lane.block(min(step, rows - first), columns, dtype, out)
                read_bytes(file.fileno(), tensor, block.raw, begin)
                begin += len(block.raw)
                yield expert, range(first, first + len(block.values)), block

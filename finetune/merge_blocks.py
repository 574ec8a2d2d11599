"""The arithmetic of a merge: blocks of a base tensor plus their share of the change, in float32, rounded once.

A block is small enough that what is done to it happens in the processor's cache. All is computed in the orientation
of the file that is written, so that the hub's transposed expert stacks are never turned.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.adapter_change import Change
from finetune.basefiles import BaseFiles
from finetune.layouts import is_expert_stack
from finetune.shapes import Shape
from finetune.tensorfile import FLOAT_TYPES, ITEM_SIZES

BLOCK = 1 << 18
"""Values of a block: two float32 buffers of 1 MiB, and the block twice in its own type."""


@dataclass(kw_only=True)
class Realised:
    """What became of one tensor's change: squares summed over all its values."""

    values: int = 0
    unchanged: int = 0
    intended_square: float = 0.0
    error_square: float = 0.0

    @property
    def intended(self) -> float:
        """The norm of the change as the adapter means it."""
        return math.sqrt(self.intended_square)

    @property
    def error(self) -> float:
        """How far the change in the file is from the one meant, relative to it: 0 is exact, 1 is lost."""
        return math.sqrt(self.error_square / self.intended_square) if self.intended_square else 0.0

    @property
    def lost(self) -> bool:
        """Whether rounding swallowed all of it."""
        return self.intended_square > 0 and self.unchanged == self.values


class Lane:
    """The buffers of one thread."""

    def __init__(self, widest_row: int) -> None:
        size = max(BLOCK, widest_row)
        self.values = size
        self.raw = torch.empty(4 * size, dtype=torch.uint8)
        self.rounded = torch.empty(4 * size, dtype=torch.uint8)
        self.sum, self.other = torch.empty(size), torch.empty(size)
        self.differs = np.empty(size, dtype=bool)

    def add(self, block: Tensor, left: Tensor, right: Tensor, found: Realised) -> Tensor:
        """Return block + left @ right in the block's type, and count what became of it. The result is a buffer."""
        count, flat = block.numel(), block.view(-1)
        total, other = self.sum[:count], self.other[:count]
        out = self.rounded[: count * block.element_size()].view(block.dtype)
        if block.dtype == torch.float32:  # the addition itself is the only rounding
            torch.mm(left, right, out=other.view(block.shape))
            torch.add(flat, other, out=out)
            torch.sub(out, flat, out=total).sub_(other)
        else:
            total.copy_(flat).view(block.shape).addmm_(left, right)
            out.copy_(total)
            total.sub_(other.copy_(out))
        found.error_square += float(torch.dot(total, total))
        found.values += count
        found.unchanged += count - self._differing(flat, out)
        return out

    def _differing(self, before: Tensor, after: Tensor) -> int:
        """How many values differ in their bits; numpy compares several times faster than torch here."""
        bits = torch.int32 if before.dtype == torch.float32 else torch.int16
        differs = self.differs[: len(before)]
        np.not_equal(before.view(bits).numpy(), after.view(bits).numpy(), out=differs)
        return int(np.count_nonzero(differs))


def intended_square(left_Eor: Tensor, right_Eri: Tensor) -> float:
    """Return the square of the norm of left @ right over all matrices, from products of size r alone."""
    grams = (left_Eor.transpose(1, 2) @ left_Eor).double() * (right_Eri @ right_Eri.transpose(1, 2)).double()
    return max(float(grams.sum()), 0.0)


def factors(change: Change) -> tuple[Tensor, Tensor]:
    """Return (left [E, rows, r], right [E, r, columns]) in float32, scale included, for matrices as files have them."""
    a_Eri, b_Eor = change.read()
    b_Eor = b_Eor.float().mul_(change.scale) if b_Eor.dtype != torch.float32 else b_Eor * change.scale
    if is_expert_stack(change.target):  # the hub has [E, in, out]
        return a_Eri.float().transpose(1, 2).contiguous(), b_Eor.transpose(1, 2).contiguous()
    return b_Eor.contiguous(), a_Eri.float().contiguous()


def blocks(base: BaseFiles, name: str, stored: Shape, lane: Lane) -> Iterator[tuple[int, range, Tensor]]:
    """Every block of a tensor in the order and orientation of the written file: matrix, rows, values [rows, columns].

    A block is a buffer of the lane, which the next one overwrites.
    """
    experts = stored[0] if is_expert_stack(name) else 1
    matrix = stored[1:] if is_expert_stack(name) else stored
    rows, columns = matrix[0], math.prod(matrix[1:])
    step = max(1, lane.values // columns)
    if is_expert_stack(name) and base.layout != "hub":
        for expert in range(experts):
            whole = base.read(name, range(expert, expert + 1))[0].t()
            for first in range(0, rows, step):
                part = whole[first : first + step]
                block = lane.raw[: part.numel() * part.element_size()].view(part.dtype).view(part.shape)
                yield expert, range(first, first + len(part)), block.copy_(part)
        return
    tensor = base.stored[name]
    size, dtype = ITEM_SIZES[tensor.dtype], getattr(torch, FLOAT_TYPES[tensor.dtype])
    handle = os.open(tensor.file, os.O_RDONLY)
    try:
        at = tensor.begin
        for expert in range(experts):
            for first in range(0, rows, step):
                height = min(step, rows - first)
                raw = lane.raw[: height * columns * size]
                _fill(handle, raw, at, f"{tensor.file}: {name}")
                at += len(raw)
                yield expert, range(first, first + height), raw.view(dtype).view(height, columns)
    finally:
        os.close(handle)


def _fill(handle: int, raw: Tensor, at: int, what: str) -> None:
    view, done = raw.numpy().data, 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], at + done)
        if not count:
            raise ValueError(f"{what} ends early: the base was cut off while it was being read")
        done += count

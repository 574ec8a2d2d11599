"""A low-rank change to one base tensor, with factors read from any form of adapter file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.architecture.shapes import Shape
from finetune.files.tensorfile import Stored, read_tensor, torch_type
from moe.packing import unpack_lora

Form = Literal["dense", "packed", "packed, turned", "single"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """The product scale x B x A, which is added to the base tensor `target`; `shape` is its shape in memory."""

    target: str
    shape: Shape
    r: int
    scale: float
    form: Form
    parts: tuple[tuple[Stored, Stored], ...]
    """The stored pairs (A, B): one pair, or for form `single` those of every expert (gate and up, or down)."""
    shares_a: bool = True
    """Whether the gate and up projections of each expert share one A."""

    @property
    def experts(self) -> int:
        """Number of matrices in the tensor; 1 for a dense tensor."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def dtype(self) -> str:
        """The data type of the factors, as safetensors files name it."""
        return self.parts[0][0].dtype

    def read(self) -> tuple[Tensor, Tensor]:
        """Return A [E, r, in] and B [E, out, r] as they are stored, without the scale; E is 1 for a dense matrix."""
        if self.form == "single":
            return self._read_singles()
        a, b = (read_tensor(part) for part in self.parts[0])
        if self.form == "dense":
            return a[None], b[None]
        a_Eri, b_Eor = unpack_lora(self.target, a, b, experts=self.experts)
        return (b_Eor.transpose(1, 2), a_Eri.transpose(1, 2)) if self.form == "packed, turned" else (a_Eri, b_Eor)

    def _read_singles(self) -> tuple[Tensor, Tensor]:
        experts, out, into = self.shape
        dtype = torch_type(self.dtype)
        a_Eri, b_Eor = torch.zeros(experts, self.r, into, dtype=dtype), torch.zeros(experts, out, self.r, dtype=dtype)
        halves = len(self.parts) // experts
        for at, (stored_a, stored_b) in enumerate(self.parts):
            a, b = read_tensor(stored_a), read_tensor(stored_b)
            expert, half = divmod(at, halves)
            top = half * b.shape[0]
            # if gate and up have separate A factors, B is block-diagonal and the two ranks add up
            left = 0 if half == 0 or self.shares_a else self.parts[at - 1][0].shape[0]
            a_Eri[expert, left : left + a.shape[0]] = a
            b_Eor[expert, top : top + b.shape[0], left : left + b.shape[1]] = b
        return a_Eri, b_Eor

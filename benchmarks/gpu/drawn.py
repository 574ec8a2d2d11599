"""A base without files: weights are drawn on the device from a seed, and read like those of a checkpoint.

Writing and reading 60 GB of random weights would take minutes; drawing them takes seconds, and both sides get the same.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from finetune.architecture.shapes import EMBEDDING, Shape
from finetune.files.basefiles import BaseFiles


@dataclass(frozen=True, kw_only=True)
class DrawnBase(BaseFiles):
    """Every tensor by canonical name in the in-memory layout; each read draws it again, and the last one is cached."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    last: dict[str, Tensor] = field(default_factory=dict)

    def size(self, name: str, rows: range | None = None) -> int:
        """Return the bytes of these rows, or of the entire tensor."""
        shape = self.shapes[name]
        return (len(rows) if rows is not None else shape[0]) * math.prod(shape[1:]) * self.dtype.itemsize

    def row_bytes(self, name: str) -> int:
        """Return the bytes of one row."""
        return self.size(name, range(1))

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return a tensor, or rows of it, on the device."""
        if name not in self.last:
            self.last.clear()
            self.last[name] = self._draw(name)
        whole = self.last[name]
        return whole if rows is None else whole[rows.start : rows.stop]

    def out_feature(self, name: str, expert: int, row: int) -> Tensor:
        """Return one row of one expert, on the CPU."""
        return self.read(name)[expert, row].cpu()

    def _draw(self, name: str) -> Tensor:
        """Draw a tensor scaled by its fan-in, so that no layer's output vanishes; norms near one, biases near zero."""
        shape = self.shapes[name]
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "big"))
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        if len(shape) == 1:
            tensor.normal_(std=0.05, generator=generator)
            return tensor.add_(1) if "norm" in name and name.endswith("weight") else tensor
        if name == EMBEDDING or name.endswith("pos_embed.weight"):
            return tensor.normal_(std=shape[1] ** -0.5, generator=generator)
        fan_in = shape[2] if ".experts." in name else math.prod(shape[1:])
        return tensor.normal_(std=fan_in**-0.5, generator=generator)


def drawn_base(folder: Path, shapes: Mapping[str, Shape], device: torch.device) -> DrawnBase:
    """Return drawn weights for a folder that has none."""
    return DrawnBase(folder=folder, layout="memory", stored={}, shapes=shapes, device=device)

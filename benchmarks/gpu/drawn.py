"""A base without files: weights drawn on the device from a seed, read as those of a checkpoint are.

60 GB of random weights would take minutes to write and to read; they are drawn in seconds, and the same on both sides.
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
    """Every tensor by canonical name, as it lies in memory; drawn anew when it is asked for, the last one is kept."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    last: dict[str, Tensor] = field(default_factory=dict)

    def size(self, name: str, rows: range | None = None) -> int:
        """Bytes of these rows."""
        shape = self.shapes[name]
        return (len(rows) if rows is not None else shape[0]) * math.prod(shape[1:]) * self.dtype.itemsize

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return a tensor, or rows of it, on the device."""
        if name not in self.last:
            self.last.clear()
            self.last[name] = self._draw(name)
        whole = self.last[name]
        return whole if rows is None else whole[rows.start : rows.stop]

    def out_feature(self, name: str, expert: int, row: int) -> Tensor:
        """Return one row of one expert, where the caller compares."""
        return self.read(name)[expert, row].cpu()

    def _draw(self, name: str) -> Tensor:
        """Scaled by fan-in, so that no layer's output vanishes; norms around one, biases around zero."""
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
    """Return the weights of a folder that has none."""
    return DrawnBase(folder=folder, layout="memory", stored={}, shapes=shapes, device=device)

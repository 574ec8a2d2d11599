"""Reopen an adapter file before it counts as written: check its content, and whether it learned anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.architecture.shapes import Shape
from finetune.files.tensorfile import FLOAT_TYPES, Stored, read_header, read_tensor
from finetune.ranks.log import listed


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The expected type and shape of a tensor; `experts` is the number packed into it, 1 for a dense tensor."""

    dtype: str
    shape: Shape
    experts: int


def reopened(file: Path, expected: Mapping[str, Expected], *, trained: bool) -> list[str]:
    """Return warnings about a file that was just written; raise if its content is not the expected one.

    Tensors are read one at a time. A factor A that is zero for some expert was never filled, since A never starts at
    zero. A factor B that is still zero after training learned nothing, and a warning names it.
    """
    stored, _ = read_header(file)
    wrong = [name for name, entry in expected.items() if name not in stored or _unlike(stored[name], entry)]
    wrong += [name for name in stored if name not in expected]
    if wrong:
        raise ValueError(f"{file} was written wrongly: {listed(wrong)}; nothing was kept")
    zero: list[str] = []
    unused: list[str] = []
    for name, entry in expected.items():
        tensor = read_tensor(stored[name])
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} holds NaN or infinity; nothing was kept. The run diverged earlier")
        empty = _empty_experts(name, tensor, entry.experts)
        if ".lora_A." in name and empty:
            raise ValueError(f"{file}: {name} is zero for experts {empty[:8]}: they never arrived; nothing was kept")
        if ".lora_B." in name and len(empty) == entry.experts:
            zero.append(name)
        elif ".lora_B." in name and empty:
            unused.append(f"{name} ({len(empty)} of {entry.experts})")
    if not trained:
        return []
    warnings = []
    if zero:
        warnings.append(f"tensors that learned nothing, with a lora_B of zero ({len(zero)}): {listed(zero)}")
    if unused:
        warnings.append(f"experts that no token reached have a lora_B of zero in {listed(unused)}")
    return warnings


def _unlike(stored: Stored, entry: Expected) -> bool:
    return (stored.dtype, tuple(stored.shape)) != (entry.dtype, tuple(entry.shape)) or stored.dtype not in FLOAT_TYPES


def _empty_experts(name: str, tensor: torch.Tensor, experts: int) -> Sequence[int]:
    """Experts for which a factor is zero; A is stored expert by expert, B rank by rank."""
    if ".lora_" not in name:
        return []
    parts = tensor.view(experts, -1) if ".lora_A." in name else tensor.view(-1, experts).t()
    return [int(expert) for expert in (~parts.bool().any(1)).nonzero().flatten()]

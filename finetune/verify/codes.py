"""The proof of fp8 files: codes and scales against numpy's quantisation of base plus adapter, in every matrix.

The sum is computed in float64 from the base and the adapter's factors, and rounded by arithmetic instead of a cast. So
the proof shares neither the sum nor the rounding with the merge. A sum close to the middle between two codes may get
either one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from finetune.adapters.merge_plan import MergePlan
from finetune.architecture.shapes import is_expert_stack
from finetune.files.basefiles import BaseFiles
from finetune.files.fp8 import BLOCK, LARGEST
from finetune.files.tensorfile import FP8, FP8_VALUES

_APART = 1e-3
_SCALE_APART = 1e-5


@dataclass(kw_only=True)
class Codes:
    """A comparison: how many codes differ, by how many steps at most, and the largest error of a scale."""

    matrices: int = 0
    values: int = 0
    apart: int = 0
    steps: float = 0.0
    scale_error: float = 0.0

    @property
    def sound(self) -> bool:
        """Return whether only sums close to the middle between two codes were rounded to the other one."""
        return self.apart <= _APART * self.values and self.steps <= 1 and self.scale_error <= _SCALE_APART

    def add(self, other: Codes) -> None:
        """Count another comparison; a NaN stays."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            joined = ours + theirs if isinstance(ours, int) else float(np.maximum(ours, theirs))
            setattr(self, field.name, joined)

    def line(self) -> str:
        """Return the result in words."""
        return (
            f"in {self.matrices:,} matrices {self.apart:,} of {self.values:,} codes differ from numpy's, by "
            f"{self.steps:g} steps at most, and scales by {self.scale_error:.0e}"
        )


def compare_codes(merged: BaseFiles, plan: MergePlan) -> Codes:
    """Compare the rows of one block in every matrix; which block depends on the matrix, so that all are covered."""
    total = Codes()
    for name, kind in plan.types.items():
        if kind == FP8:
            for expert in range(merged.shapes[name][0]) if is_expert_stack(name) else (None,):
                total.add(_compare(merged, plan, name, expert, total.matrices))
    return total


def _compare(merged: BaseFiles, plan: MergePlan, name: str, expert: int | None, number: int) -> Codes:
    codes, scales = merged.codes(name, expert)
    group = number % len(scales)
    rows = slice(group * BLOCK, group * BLOCK + BLOCK)
    ours = np.take(FP8_VALUES, codes[rows].contiguous().view(torch.uint8).numpy())
    scale = scales[group].numpy()
    kept = plan.base.dtypes[name] == FP8 and name not in {*plan.source.changes, *plan.source.full}
    if kept:
        base_codes, base_scales = plan.base.codes(name, expert)
        ideal = np.take(FP8_VALUES, base_codes[rows].contiguous().view(torch.uint8).numpy())
        ideal_scale = base_scales[group].numpy()
    else:
        ideal, ideal_scale = _quantised(_sum(plan, name, expert, rows))
    apart = np.abs(ours - ideal) / _steps(ideal)
    return Codes(
        matrices=1,
        values=ours.size,
        apart=int((apart != 0).sum()),
        steps=float(apart.max()),
        scale_error=float(np.abs(scale / ideal_scale - 1).max()),
    )


def _sum(plan: MergePlan, name: str, expert: int | None, rows: slice) -> Any:
    """Return rows of a matrix of base plus adapter in float64, in the orientation of the files."""
    where = None if expert is None else range(expert, expert + 1)
    if name in plan.source.full:
        whole = plan.source.read_full(name)
        whole = whole if expert is None else whole[expert].t()
        return whole[rows].double().numpy()
    change = plan.source.changes.get(name)
    base = plan.base.read(name, where)
    if change is None:
        return (base if expert is None else base[0].t())[rows].double().numpy()
    a, b = (factor[expert or 0].double().numpy() for factor in change.read())
    if expert is None:
        return base[rows].double().numpy() + change.scale * (b[rows] @ a)
    return base[0].t()[rows].double().numpy() + change.scale * (a[:, rows].T @ b.T)


def _quantised(values: Any) -> tuple[Any, Any]:
    """Return the value of the code nearest to each value of a row of blocks, with ties to even, and the scales."""
    columns = values.shape[1]
    starts = range(0, columns, BLOCK)
    largest = np.array([np.abs(values[:, first : first + BLOCK]).max() for first in starts], dtype=np.float32)
    scales = largest / np.float32(LARGEST)
    scales[scales == 0] = 1
    shrunk = values.astype(np.float32) / np.repeat(scales, BLOCK)[:columns]
    steps = _steps(shrunk)
    return np.rint(shrunk / steps) * steps, scales


def _steps(values: Any) -> Any:
    """Return the distance of neighbouring codes around each value."""
    exponents = np.where(values == 0, 0, np.frexp(values)[1] - 1 + 6)  # above that of the smallest normal code
    return np.ldexp(np.float32(1), np.maximum(exponents, 0) - 9)

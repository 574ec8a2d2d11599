"""`a2a-units`: how often all routed rows of a layer cross ranks in one micro-batch, by recompute mode."""

from collections.abc import Iterator
from typing import Literal

from benchmarks.experts.expert_ranks import HIDDEN, LAYERS, LENGTH, ROWS, TOP_K, Setup, count
from benchmarks.harness.figure import Figure
from benchmarks.harness.measure import counted
from benchmarks.harness.outputs import same_tensors

WORLD = 2
UNITS: dict[Literal["none", "layer", "selective"], int] = {"none": 4, "layer": 6, "selective": 4}
"""Rows out and back, and their gradients; `layer` sends rows out and back a second time."""


def run() -> Iterator[Figure]:
    """Yield the bytes of the all-to-alls of rows over all ranks, which must equal the formula."""
    setups = [Setup(side="ours", resident=True, recompute=mode) for mode in UNITS]
    counts = dict(zip(UNITS, count(setups, world=WORLD), strict=True))
    payload = ROWS * LENGTH * TOP_K * HIDDEN * 4  # float32
    for mode, units in UNITS.items():
        for ours, none in zip(counts[mode], counts["none"], strict=True):
            same_tensors({"logits": ours.logits}, {"logits": none.logits}, relative=1e-6)
        sent = sum(
            size
            for rank in counts[mode]
            for kind, size in rank.micro_batch.items()
            if kind.collective == "all_to_all_single" and kind.dtype == "float32"
        )
        yield counted(
            f"rows sent a micro-batch, recompute {mode}",
            sent,
            "bytes",
            expected=units * payload * LAYERS,
            config={"ranks": WORLD, "ep": WORLD, "units_a_layer": sent / payload / LAYERS},
        )

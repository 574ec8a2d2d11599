"""`host-overhead`: what a micro-batch costs beside its kernels: many layers and calls, on almost no numbers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.figure import Figure, Target
from benchmarks.harness.measure import spread
from benchmarks.steps.train_step import PEER, STEPS, race_side, same_losses
from benchmarks.weights.load import start_ranks
from finetune.files.tiny import TinyModel, write_tiny

MODEL = TinyModel(hidden=48, experts=8, top_k=2, expert_hidden=16, layers=12, heads=2, kv_heads=1, head_dim=16)
TOKENS, FEW, MANY = 16, 1, 5
TARGET = Target(of="ratio", rule="at least", floor=3.5, goal=5.0)


def run() -> Iterator[Figure]:
    """Yield milliseconds of a micro-batch on one rank: the difference of two steps, so that the update cancels out."""
    cases = [(TOKENS, number) for number in (FEW, MANY)]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_tiny(base, MODEL)
        start_ranks(1, "adapter", base, module="benchmarks.steps.train_ranks")
        ours, peer = (race_side(side, base, cases, ranks=1) for side in ("ours", "peer"))
    for mine, theirs in zip(ours, peer, strict=True):
        same_losses(mine, theirs)
    yield Figure(
        metric=f"host time of a micro-batch, {MODEL.layers} layers", unit="ms", value=_one(ours),
        config={"tokens": TOKENS, "layers": MODEL.layers, "ranks": 1, "micro_batches": [FEW, MANY]}, n=STEPS - 1,
        spread={"ours": spread(ours[-1]["seconds"]), "peer": spread(peer[-1]["seconds"])},
        peer=f"{PEER}, recompute layer", peer_value=_one(peer), target=TARGET,
    )  # fmt: skip


def _one(side: Any) -> float:
    few, many = (min(case["seconds"]) for case in side)
    return float(1e3 * (many - few) / (MANY - FEW))

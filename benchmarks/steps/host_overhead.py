"""`host-overhead`: the cost of a micro-batch other than its kernels: many layers and calls on very little data."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.figure import Figure, Peer, ratio_at_least
from benchmarks.harness.measure import spread
from benchmarks.steps.train_step import PEER, STEPS, race_side, same_losses
from benchmarks.weights.load import start_ranks
from finetune.files.tiny import TinyModel, write_tiny

MODEL = TinyModel(hidden=48, experts=8, top_k=2, expert_hidden=16, layers=12, heads=2, kv_heads=1, head_dim=16)
TOKENS = 16
FEW, MANY = 1, 5
TARGET = ratio_at_least(3.5, goal=5.0)


def run() -> Iterator[Figure]:
    """Yield milliseconds per micro-batch on one rank, from the difference of two steps, which cancels the update."""
    cases = [(TOKENS, number) for number in (FEW, MANY)]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_tiny(base, MODEL)
        start_ranks(1, "adapter", base, module="benchmarks.steps.train_ranks")
        ours, peer = (race_side(side, base, cases, ranks=1) for side in ("ours", "peer"))
    for our_case, peer_case in zip(ours, peer, strict=True):
        same_losses(our_case, peer_case)
    yield Figure(
        f"host time of a micro-batch, {MODEL.layers} layers",
        _milliseconds(ours),
        "ms",
        config={"tokens": TOKENS, "layers": MODEL.layers, "ranks": 1, "micro_batches": [FEW, MANY]},
        n=STEPS - 1,
        spread={"ours": spread(ours[-1]["seconds"]), "peer": spread(peer[-1]["seconds"])},
        peer=Peer(f"{PEER}, recompute layer", _milliseconds(peer)),
        target=TARGET,
    )


def _milliseconds(side: Any) -> float:
    few, many = (min(case["seconds"]) for case in side)
    return float(1e3 * (many - few) / (MANY - FEW))

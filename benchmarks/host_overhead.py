"""`host-overhead`: what a step costs beside its kernels: the same number of layers and calls, on almost no numbers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.load import start_ranks
from benchmarks.measure import spread
from benchmarks.train_step import PEER, STEPS, race_side, same_losses
from finetune.tiny import TinyModel, write_tiny

MODEL = TinyModel(hidden=48, experts=8, top_k=2, expert_hidden=16, layers=8, heads=2, kv_heads=1, head_dim=16)
TOKENS, MICRO_BATCHES = 16, (1, 4)


def run() -> Iterator[Figure]:
    """Yield milliseconds of a step by its number of micro-batches, on one rank, where kernels have nothing to do."""
    cases = [(TOKENS, number) for number in MICRO_BATCHES]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_tiny(base, MODEL)
        start_ranks(1, "adapter", base, module="benchmarks.train_ranks")
        ours, peer = (race_side(side, base, cases, ranks=1) for side in ("ours", "peer"))
    for number, mine, theirs in zip(MICRO_BATCHES, ours, peer, strict=True):
        same_losses(mine, theirs)
        yield Figure(
            metric=f"host time of a step, {MODEL.layers} layers, {number} micro-batches", unit="ms",
            value=1e3 * min(mine["seconds"]), config={"tokens": TOKENS, "layers": MODEL.layers, "ranks": 1},
            n=STEPS - 1, spread={"ours": spread(mine["seconds"]), "peer": spread(theirs["seconds"])},
            peer=f"{PEER}, recompute layer", peer_value=1e3 * min(theirs["seconds"]),
        )  # fmt: skip

"""`train-step`: full optimiser steps on two ranks, compared with transformers, PEFT and DeepSpeed ZeRO-3."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.figure import Figure, Peer, ratio_at_least
from benchmarks.harness.measure import spread
from benchmarks.harness.outputs import same_tensors
from benchmarks.weights.load import start_ranks
from finetune.files.tiny import TinyModel, write_tiny

MODEL = TinyModel(
    hidden=512,
    experts=128,
    top_k=8,
    expert_hidden=192,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=64,
    shard_bytes=200_000_000,
)
PEER = "transformers grouped_mm + PEFT + DeepSpeed ZeRO-3"
RANKS, STEPS = 2, 6
CASES = {
    "256 tokens": (256, 1, ratio_at_least(4.0, goal=5.5)),
    "1,024 tokens": (1024, 1, ratio_at_least(1.8, goal=2.5)),
    "4 x 256 tokens": (256, 4, ratio_at_least(4.0, goal=6.0)),
}
RELATIVE = 1e-4
"""Allowed difference of the losses of a step, relative to the largest loss."""


def run() -> Iterator[Figure]:
    """Yield useful tokens per second of each case, from its fastest step; both sides recompute layers."""
    cases = [(tokens, micro_batches) for tokens, micro_batches, _ in CASES.values()]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_tiny(base, MODEL)
        start_ranks(1, "adapter", base, module="benchmarks.steps.train_ranks")
        ours, peer = (race_side(side, base, cases) for side in ("ours", "peer"))
        selective = race_side("ours", base, cases, "--recompute", "selective")
    for number, (metric, (tokens, micro_batches, target)) in enumerate(CASES.items()):
        same_losses(ours[number], peer[number])
        same_losses(selective[number], peer[number])
        useful = RANKS * tokens * micro_batches
        config = {
            "ranks": RANKS,
            "ep": RANKS,
            "tokens": tokens,
            "micro_batches": micro_batches,
            "experts": MODEL.experts,
            "top_k": MODEL.top_k,
            "hidden": MODEL.hidden,
            "expert_hidden": MODEL.expert_hidden,
            "layers": MODEL.layers,
            "r": 8,
            "dtype": "float32",
        }
        for recompute, of_ours, goal in (("layer", ours[number], target), ("selective", selective[number], None)):
            yield Figure(
                f"useful tokens/s, {metric} per rank, recompute {recompute}",
                useful / min(of_ours["seconds"]),
                "tokens/s",
                config={**config, "recompute": recompute},
                n=STEPS - 1,
                better="higher",
                spread={"ours": spread(of_ours["seconds"]), "peer": spread(peer[number]["seconds"])},
                peer=Peer(f"{PEER}, recompute layer", useful / min(peer[number]["seconds"])),
                target=goal,
            )


def race_side(side: str, base: Path, cases: Sequence[tuple[int, int]], *words: str, ranks: int = RANKS) -> Any:
    """Return seconds and losses of one side's steps for each case; the slowest rank determines the time of a step."""
    given = ["--cases", json.dumps(cases), "--steps", str(STEPS), *words]
    results = start_ranks(ranks, side, base, *given, module="benchmarks.steps.train_ranks")
    return [
        {
            "seconds": tuple(map(max, *(rank[n]["seconds"] for rank in results), [0.0] * (STEPS - 1))),
            "losses": results[0][n]["losses"],
        }
        for n in range(len(cases))
    ]


def same_losses(ours: Any, peer: Any) -> None:
    """Raise if the losses of the sides differ."""
    our_losses, peer_losses = ({"losses": torch.tensor(side["losses"], dtype=torch.float64)} for side in (ours, peer))
    same_tensors(our_losses, peer_losses, relative=RELATIVE)

"""`ckpt-save`: bytes of a checkpoint relative to the trained state, and seconds of saves in both modes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.figure import Figure, at_most
from benchmarks.harness.measure import fastest
from benchmarks.weights.load import start_ranks
from finetune.files.tiny import TinyModel, write_tiny

MODEL = TinyModel(hidden=512, experts=8, expert_hidden=320, layers=4)


def run() -> Iterator[Figure]:
    """Save and restore on two ranks; yield bytes over those of the state, and seconds of saves synced to the disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        write_tiny(folder, MODEL)
        ranks = start_ranks(2, "save", folder, module="benchmarks.weights.ckpt_ranks")
    state = sum(rank["state_bytes"] for rank in ranks)
    config = {"ranks": 2, "ep": 2, "state_bytes": state, "asynchronous": False}
    yield Figure(
        "bytes of a checkpoint over the trained state",
        ranks[0]["bytes"] / state,
        "x",
        config=config,
        target=at_most(1.02),
    )
    slowest = {
        side: tuple(map(max, *(rank[side] for rank in ranks))) for side in ("ours", "peer", "stalls", "peer_stalls")
    }
    ours, stalls = slowest["ours"], slowest["stalls"]
    synced = ("torch.save of each rank's slices, synced", slowest["peer"])
    yield fastest("seconds of a save", ours, "s", config=config, peer=synced)
    config |= {"asynchronous": True}
    metric = "seconds for which an asynchronous save holds the run up"
    yield fastest(metric, stalls, "s", config=config, peer=("the same save, synchronous", ours))
    torchs = ("torch's async_save of each rank's slices", slowest["peer_stalls"])
    yield fastest("the same, beside torch's", stalls, "s", config=config, peer=torchs)
    yield Figure("seconds of a restore", max(rank["restore"] for rank in ranks), "s", config=config)

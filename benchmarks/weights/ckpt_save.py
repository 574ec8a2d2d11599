"""`ckpt-save`: bytes of a checkpoint beside the state that trains; seconds of a save, and of one behind the run."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.figure import Figure, Target
from benchmarks.harness.measure import spread
from benchmarks.weights.load import start_ranks
from finetune.files.tiny import TinyModel, write_tiny

MODEL = TinyModel(hidden=512, experts=8, expert_hidden=320, layers=4)


def run() -> Iterator[Figure]:
    """Save and restore on two ranks: bytes over the state's own, seconds of a save that is through to the disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        write_tiny(folder, MODEL)
        ranks = start_ranks(2, "save", folder, module="benchmarks.weights.ckpt_ranks")
    state = sum(rank["state_bytes"] for rank in ranks)
    config = {"ranks": 2, "ep": 2, "state_bytes": state, "asynchronous": False}
    yield Figure(
        metric="bytes of a checkpoint over the trained state", value=ranks[0]["bytes"] / state, unit="x", config=config,
        target=Target(of="value", rule="at most", floor=1.02),
    )  # fmt: skip
    ours, peer = (tuple(map(max, *(rank[side] for rank in ranks))) for side in ("ours", "peer"))
    yield Figure(
        metric="seconds of a save", value=min(ours), unit="s", config=config, n=len(ours),
        spread={"ours": spread(ours), "peer": spread(peer)},
        peer="torch.save of each rank's slices, synced", peer_value=min(peer),
    )  # fmt: skip
    stalls, peer = (tuple(map(max, *(rank[side] for rank in ranks))) for side in ("stalls", "peer_stalls"))
    config |= {"asynchronous": True}
    yield Figure(
        metric="seconds for which an asynchronous save holds the run up", value=min(stalls), unit="s", config=config,
        n=len(stalls), spread={"ours": spread(stalls)}, peer="the same save, synchronous", peer_value=min(ours),
    )  # fmt: skip
    yield Figure(
        metric="the same, beside torch's", value=min(stalls), unit="s", config=config, n=len(stalls),
        spread={"ours": spread(stalls), "peer": spread(peer)}, peer="torch's async_save of each rank's slices",
        peer_value=min(peer),
    )  # fmt: skip
    yield Figure(metric="seconds of a restore", value=max(rank["restore"] for rank in ranks), unit="s", config=config)

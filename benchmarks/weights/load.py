"""`load`: load a base from disk into two ZeRO-3 ranks, compared with transformers' `from_pretrained` under ZeRO-3."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.figure import Figure, Peer, at_most, ratio_at_least
from benchmarks.harness.measure import fastest
from benchmarks.harness.outputs import same_tensors
from finetune.files.tiny import TinyModel, write_tiny

ROUNDS = 3
PEER = "transformers from_pretrained under ZeRO-3"
MODEL = TinyModel(hidden=1024, experts=32, expert_hidden=640, layers=4, shard_bytes=150_000_000)


def run() -> Iterator[Figure]:
    """Yield time and peak memory above the imports, and the time of only reading the files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        size = write_tiny(folder, MODEL).weight_bytes
        config = {"ranks": 2, "ep": 2, "weight_bytes": size, "partitioned": True}
        ways = {"ours": ["ours", "--ep", "2"], "peer": ["transformers"], "raw": ["raw"]}
        runs_of: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, words in ways.items():
                runs_of[way].append(start_ranks(2, words[0], folder, *words[1:]))
        _same_outputs(runs_of["ours"][0], runs_of["peer"][0])
        seconds = {
            way: tuple(max(rank["seconds"] for rank in ranks) for ranks in runs) for way, runs in runs_of.items()
        }
        peaks = {way: min(max(rank["peak"] for rank in ranks) for ranks in runs) for way, runs in runs_of.items()}
        yield fastest(
            "seconds to load",
            seconds["ours"],
            "s",
            config=config,
            peer=(PEER, seconds["peer"]),
            target=ratio_at_least(1.5, goal=3.0),
        )
        yield Figure(
            "peak memory of a rank",
            peaks["ours"],
            "bytes",
            config=config,
            n=ROUNDS,
            peer=Peer(PEER, peaks["peer"]),
            target=ratio_at_least(1 / 0.6, goal=1 / 0.4),
        )
        beyond = min(max(rank["peak"] - rank["kept"] for rank in ranks) for ranks in runs_of["ours"])
        yield Figure(
            "peak beyond what is kept, over the largest tensor",
            beyond / runs_of["ours"][0][0]["largest"],
            "x",
            config=config,
            n=ROUNDS,
            target=at_most(2.0, goal=1.5),
        )
        reading = ("reading the files alone", seconds["raw"])
        yield fastest("seconds to load", seconds["ours"], "s", config=config, peer=reading)


def start_ranks(
    ranks: int, side: str, folder: Path, *words: str, module: str = "benchmarks.weights.load_ranks"
) -> list[Any]:
    """Start a module on N ranks of this machine, and return the result of each rank."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "rank"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launch, "-m", module, side, str(folder), str(out), *words]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]


def _same_outputs(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> None:
    for side in zip(ours, peer, strict=True):
        our_logits, peer_logits = ({"logits": torch.tensor(rank["logits"])} for rank in side)
        same_tensors(our_logits, peer_logits, relative=1e-4)

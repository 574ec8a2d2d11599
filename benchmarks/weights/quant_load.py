"""`quant-load`: load a base into two ranks with its experts in int8 and nf4, compared with bfloat16."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.figure import Figure, Peer, at_most
from benchmarks.harness.measure import fastest
from benchmarks.weights.load import MODEL, start_ranks
from finetune.files.tiny import write_tiny

ROUNDS = 3


def run() -> Iterator[Figure]:
    """Yield the seconds, the peak memory above the imports, and the part of it that is freed again, for each form."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        size = write_tiny(folder, MODEL).weight_bytes
        config = {"ranks": 2, "ep": 2, "weight_bytes": size}
        runs: dict[str, list[list[dict[str, Any]]]] = {bits: [] for bits in ("none", "int8", "nf4")}
        for _ in range(ROUNDS):
            for bits, done in runs.items():
                done.append(start_ranks(2, "ours", folder, "--ep", "2", "--resident", "--bits", bits))
    seconds = {bits: tuple(max(rank["seconds"] for rank in ranks) for ranks in done) for bits, done in runs.items()}
    peaks = {bits: min(max(rank["peak"] for rank in ranks) for ranks in done) for bits, done in runs.items()}
    for bits in ("int8", "nf4"):
        here = {**config, "bits": bits}
        yield fastest(
            f"seconds to load in {bits}", seconds[bits], "s", config=here, peer=("in bfloat16", seconds["none"])
        )
        yield Figure(
            f"peak memory of a rank, {bits}",
            peaks[bits],
            "bytes",
            config=here,
            n=ROUNDS,
            peer=Peer("in bfloat16", peaks["none"]),
        )
        ranks = [rank for done in runs[bits] for rank in done]
        beyond = min(rank["peak"] - rank["held"] for rank in ranks)
        yield Figure(
            f"peak beyond what is kept, over the largest tensor, {bits}",
            beyond / ranks[0]["largest"],
            "x",
            config=here,
            n=ROUNDS,
            target=at_most(2.0, goal=1.5),
        )

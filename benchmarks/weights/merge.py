"""`merge`: merge an adapter of experts and attention into a base, compared with PEFT and with a plain copy."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness.figure import Figure, Peer, ratio_at_least
from benchmarks.harness.measure import fastest
from benchmarks.harness.outputs import same_tensors
from benchmarks.weights.merge_case import measured, write_adapter, write_base
from finetune.files.basefiles import open_base

ROUNDS = 3
PEER = "PEFT merge_and_unload + save_pretrained"


def run() -> Iterator[Figure]:
    """Yield time and peak memory above the imports; merges are hashed and synced, and the copy is synced too."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        size = write_base(place / "base")
        adapter = write_adapter(place / "base", place / "adapter")
        config = {"weight_bytes": size, "adapter_bytes": adapter, "dtype": "bfloat16", "checksums": "sha256"}
        runs_of: dict[str, list[dict[str, Any]]] = {"ours": [], "peft": [], "copy": []}
        for number in range(ROUNDS):
            for side, runs in runs_of.items():
                runs.append(measured(side, place / "base", place / "adapter", place / side))
            if not number:
                _same_outputs(place / "ours", place / "peft")
            for side in runs_of:
                shutil.rmtree(place / side)
    seconds = {side: tuple(run["seconds"] for run in runs) for side, runs in runs_of.items()}
    peaks = {side: min(run["peak"] for run in runs) for side, runs in runs_of.items()}
    yield fastest(
        "seconds to merge",
        seconds["ours"],
        "s",
        config=config,
        peer=(PEER, seconds["peft"]),
        target=ratio_at_least(2.0, goal=4.0),
    )
    yield Figure(
        "peak memory above imports",
        peaks["ours"],
        "bytes",
        config=config,
        n=ROUNDS,
        peer=Peer(PEER, peaks["peft"]),
        target=ratio_at_least(3.0, goal=6.0),
    )
    yield fastest(
        "seconds to merge",
        seconds["ours"],
        "s",
        config=config,
        peer=("a plain copy, synced", seconds["copy"]),
        target=ratio_at_least(1 / 1.6, goal=1 / 1.3),
    )


def _same_outputs(ours: Path, peft: Path) -> None:
    """Compare some tensors of each kind; PEFT rounds the change before adding it, so a bfloat16 may be off by one."""
    kinds = ("embed_tokens.weight", "q_proj.weight", "o_proj.weight", "gate_up_proj", "down_proj", "gate.weight")

    def some(folder: Path) -> dict[str, Tensor]:
        files = open_base(folder)
        names = [name for name in files.shapes if name.endswith(kinds) and "visual" not in name]
        return {name: files.read(name, range(min(2, files.shapes[name][0]))).float() for name in names}

    same_tensors(some(ours), some(peft), relative=1e-2)

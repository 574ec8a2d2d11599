"""Complete runs of the training loop on a tiny base, started as by a user and compared with each other.

Together they take steps, evaluate, answer, save in both modes, restore, offload and write an adapter.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.material import TINY, write_rows
from benchmarks.gpu.parts import Skipped
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure, at_least, at_most
from benchmarks.harness.measure import OutputsDiffer
from finetune.files.tiny import write_tiny

RELATIVE = 3e-2
"""Allowed difference of losses and gradient norms between two runs, which sum in another order in bfloat16."""
WORDS = (
    "tiny-cpu",
    "model.path=base",
    'model.family=""',
    "data.sources.general.path=rows.jsonl",
    "data.image.min_tokens=4",
    "data.image.max_tokens=32",
    "data.workers=2",
    "schedule.steps=4",
    "checkpoint.every_steps=2",
    "parallel.ep=1",
    "eval.every_steps=0",
    "eval.sources.held.path=rows.jsonl",
    "moe.balance=global",
)


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield the difference between a run and one that resumed its checkpoint with other memory options."""
    with tempfile.TemporaryDirectory() as name:
        place = _place(Path(name), packs=4)
        straight = train(
            place, sizes, "straight", "data.packs_per_step=4", "eval.answers=2", "parallel.recompute=layer"
        )
        resumed = train(
            place,
            sizes,
            "resumed",
            "data.packs_per_step=4",
            "checkpoint.asynchronous=true",
            "checkpoint.resume=runs/straight/checkpoints/step-000002",
            "parallel.recompute=layer",
            "parallel.offload_activations=true",
        )
        yield _apart("restored, offloaded", resumed, straight[2:])
        saved = [path.name for path in sorted((place / "runs/resumed/checkpoints").iterdir()) if path.is_dir()]
        answers = (place / "runs/straight/predictions.jsonl").read_text().splitlines()
    yield Figure(
        "checkpoints that were written behind the run",
        len(saved),
        "checkpoints",
        config={"folders": saved},
        better="higher",
        target=at_least(1),
    )
    yield Figure(
        "answers that evaluations wrote",
        len(answers),
        "answers",
        config={"words": ["eval.answers=2"]},
        better="higher",
        target=at_least(2),
    )


def run_ranks(sizes: Sizes) -> Iterator[Figure]:
    """Yield the difference between the same steps on all GPUs and on one GPU, for each kind of parallelism."""
    if sizes.world < 2:
        raise Skipped("one GPU: this part needs at least two")
    ep = max(n for n in (1, 2, 4, 8) if sizes.world % n == 0)
    ways = {
        f"ep {ep}": [f"parallel.ep={ep}", "parallel.resident=frozen"],
        "frozen weights partitioned by ZeRO-3": ["parallel.resident=none"],
    }
    if sizes.world % 2 == 0:
        ways["rows over 2 ranks, ep 2"] = ["parallel.sp=2", "parallel.ep=2"]
    with tempfile.TemporaryDirectory() as name:
        place, packs = _place(Path(name), packs=2 * sizes.world), f"data.packs_per_step={2 * sizes.world}"
        alone = train(place, sizes, "alone", packs)
        for number, (what, words) in enumerate(ways.items()):
            shared_run = train(place, sizes, f"way-{number}", packs, *words, ranks=sizes.world)
            yield _apart(f"{sizes.world} ranks, {what}", shared_run, alone)


def train(place: Path, sizes: Sizes, name: str, *words: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Run the loop on `ranks` processes in this process group, and return the metrics of its steps."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "finetune.train", *WORDS, f"run.name={name}", *words]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            command,
            cwd=place,
            env=os.environ | common | {"RANK": str(n), "LOCAL_RANK": str(n), "DS_ACCELERATOR": sizes.device},
        )
        for n in range(ranks)
    ]
    try:
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"the run {name} ended with {codes}: {' '.join(command)}")
    return [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def _place(folder: Path, *, packs: int) -> Path:
    """Write a base, and rows for more than one step of an epoch."""
    write_tiny(folder / "base", TINY)
    write_rows(folder, 8 * packs)  # five rows fill a pack
    return folder


def _apart(what: str, run: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> Figure:
    """Return the largest relative difference of a loss or gradient norm over all steps."""
    steps = [[step["step"] for step in side] for side in (run, reference)]
    if steps[0] != steps[1] or not steps[0]:
        raise OutputsDiffer(f"{what}: it took steps {steps[0]}, but the reference took steps {steps[1]}")
    pairs = [(a[key], b[key]) for a, b in zip(run, reference, strict=True) for key in ("loss", "grad_norm")]
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    return Figure(
        f"{what}: largest difference of losses and gradient norms",
        apart,
        "of the value",
        config={"steps": steps[0], "losses": [step["loss"] for step in run], "words": list(WORDS)},
        target=at_most(RELATIVE),
    )

"""Runs as a user starts them: a command in a folder of `toy_run`, and its output files."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from limits import LIMIT_S
from places import ROOT
from starts import environment

TRAIN = [sys.executable, "-m", "launchers.cli", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PATIENT = f"""
import os
if os.environ.get("RANK") == "0":  # what gives W&B's client seconds to start and to end; a busy machine takes longer
    import finetune.tracking.wandb_link
    finetune.tracking.wandb_link.START_S = finetune.tracking.wandb_link.FINISH_S = {LIMIT_S}
"""


def start(
    place: Path,
    command: Sequence[str],
    name: str,
    *words: str,
    at: str = "",
    then: Callable[[int], None] | None = None,
    site: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; when a line of standard output starts with `at`, call `then` with its process id.

    `site` is Python code that each of its processes runs first.
    """
    line = [
        *command,
        "tiny-cpu",
        f"run.name={name}",
        "model.path=base",
        "model.dtype=float32",
        "data.sources.general.path=rows.jsonl",
        *words,
    ]
    folder = place / f"{name}.site"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(PATIENT + site)
    settings = environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    errors = place / f"{name}.stderr"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            line, cwd=place, env=settings, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        ) as process,
    ):
        lines = []
        try:
            assert process.stdout is not None
            for text in process.stdout:
                lines.append(text)
                if then is not None and text.startswith(at):
                    then(process.pid)
                    then = None
            process.wait(LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert then is None, f"no line started with {at!r}: {''.join(lines)[-2000:]} {errors.read_text()[-3000:]}"
    return subprocess.CompletedProcess(line, process.returncode, "".join(lines), errors.read_text())


def metrics(place: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def beat(place: Path, name: str, rank: int) -> dict:
    """Return the last heartbeat of a rank."""
    return json.loads((place / "runs" / name / "logs" / f"rank-{rank:04d}.json").read_text())

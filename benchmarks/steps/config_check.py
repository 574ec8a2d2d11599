"""`config-check`: cold start to a checked recipe, compared with a tool that imports torch before it reads its YAML."""

import os
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness.figure import Figure, ratio_at_least
from benchmarks.harness.machine import ROOT
from benchmarks.harness.measure import OutputsDiffer, Side, race

RECIPE = "qwen3-vl-30b-a3b-lora"
CHECK = [sys.executable, "-m", "launchers.cli", "check", RECIPE]
IMPORT_TORCH = [sys.executable, "-c", "import torch"]
TARGET = ratio_at_least(2.0, goal=4.0)


def run() -> Iterator[Figure]:
    """Yield the wall time of a fresh process, with the files in the page cache for both sides."""
    measured = race(
        Side(name="moetune check", run=lambda: _output(CHECK)),
        Side(name="import torch", run=lambda: _output(IMPORT_TORCH)),
        same=lambda text, _: _same_twice(text, CHECK),
        rounds=3,
    )
    yield measured.figure("cold start of check", config={"recipe": RECIPE}, target=TARGET)


def _same_twice(first: str, command: list[str]) -> None:
    """Raise if the check prints no effective config, or not the same one each time."""
    if "model:" not in first:
        raise OutputsDiffer(f"`{' '.join(command[1:])}` printed no effective config, but: {first[:500]!r}")
    if (second := _output(command)) != first:
        raise OutputsDiffer(f"`{' '.join(command[1:])}` printed two different texts:\n{first}\n---\n{second}")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode != 0:
        raise OutputsDiffer(f"`{' '.join(command[1:])}` ended with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout

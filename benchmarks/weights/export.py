"""`export`: seconds per GB to export an adapter to each form for servers, including the check by reading it back."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.figure import Figure
from benchmarks.harness.measure import fastest
from benchmarks.weights.merge_case import measured, write_adapter, write_base

ROUNDS = 3
R = 64


def run() -> Iterator[Figure]:
    """Export each form several times; the export itself refuses an output that reads back differently."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_base(place / "base")
        size = write_adapter(place / "base", place / "adapter", r=R)
        for form in ("peft", "per-expert"):
            runs = []
            for _ in range(ROUNDS):
                runs.append(measured(f"export-{form}", place / "base", place / "adapter", place / "out"))
                shutil.rmtree(place / "out")
            seconds = tuple(run["seconds"] / (size / 1e9) for run in runs)
            config = {"form": form, "adapter_bytes": size, "r": R, "peak_bytes": min(run["peak"] for run in runs)}
            yield fastest("seconds per GB", seconds, "s/GB", config=config)

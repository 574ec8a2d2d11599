"""Run each part in its own process group, kill it at its limit, and keep the figures that it has measured."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.parts import Part, Skipped
from benchmarks.gpu.sizes import Sizes

SKIPPED = 77
"""Exit code of a part that has nothing to do here."""
LEAST_SECONDS = 5.0
"""A part is not started if less time than this is left."""
TEN_MINUTES = 600.0


def run_parts(
    parts: Sequence[Part], sizes: Sizes, *, minutes: float, log: TextIO, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run the parts in turn and yield the outcome of each, failures included; none starts after the time is over."""
    end = time.monotonic() + 60 * minutes
    for part in parts:
        log.write(f"\n===== {part.name}: {part.about}\n")
        log.flush()
        limit = min(part.seconds * 60 * minutes / TEN_MINUTES, end - time.monotonic())
        if limit < LEAST_SECONDS * min(1.0, 60 * minutes / TEN_MINUTES):
            outcome = _outcome(part, "skipped", f"the {minutes:g} minutes are over", 0.0, limit, [])
        else:
            outcome = _run(part, sizes, limit, log, os.environ | (environment or {}))
        reason = f": {outcome['reason']}" if outcome["reason"] else ""
        log.write(f"===== {part.name} {outcome['outcome']} after {outcome['seconds']:.1f} s{reason}\n")
        log.flush()
        yield outcome


def _run(part: Part, sizes: Sizes, limit: float, log: TextIO, environment: Mapping[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        given, out = Path(name) / "sizes", Path(name) / "found.jsonl"
        given.write_bytes(pickle.dumps(sizes))
        start, at = time.monotonic(), log.tell()
        command = [sys.executable, "-m", "benchmarks.gpu.runner", part.run, str(given), str(out)]
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C or a normal end: a leftover rank would hold memory and use time
            _kill_group(process.pid)
            process.wait()
        seconds = time.monotonic() - start
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    log.seek(0, os.SEEK_END)
    figures = [line["figure"] | {"name": part.name} for line in lines if "figure" in line]
    missed = [figure["metric"] for figure in figures if figure["pass"] is False]
    if code is None:
        return _outcome(part, "timed out", f"not done after {limit:.0f} s", seconds, limit, figures)
    if code == SKIPPED:
        return _outcome(part, "skipped", lines[-1]["skipped"], seconds, limit, figures)
    if code:
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else _last_line(Path(log.name), at)
        return _outcome(part, "failed", why, seconds, limit, figures)
    why = f"not reached: {'; '.join(missed)}" if missed else ""
    return _outcome(part, "failed" if missed else "passed", why, seconds, limit, figures)


def _outcome(
    part: Part, outcome: str, reason: str, seconds: float, limit: float, figures: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "part": part.name,
        "about": part.about,
        "outcome": outcome,
        "reason": reason,
        "seconds": round(seconds, 2),
        "limit_seconds": round(max(limit, 0.0), 2),
        "figures": figures,
    }


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last_line(log: Path, at: int) -> str:
    with log.open("rb") as file:
        file.seek(at)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def child(target: str, sizes: Path, out: Path) -> int:
    """Run one part in this process, and write each figure as soon as it is measured."""
    module, _, function = target.partition(":")
    run = getattr(import_module(module), function)
    with out.open("a", buffering=1) as results:
        try:
            for figure in run(pickle.loads(sizes.read_bytes())):  # written by the parent
                print(figure.line(), flush=True)
                results.write(json.dumps({"figure": figure.record(name="", surroundings={})}) + "\n")
        except Skipped as why:
            results.write(json.dumps({"skipped": str(why)}) + "\n")
            return SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1], *map(Path, sys.argv[2:])))

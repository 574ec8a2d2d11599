"""Explains why a run hung or died, on one page, from what its ranks left in its logs. Loads no torch.

A rank leaves rank-0007.log (its log), rank-0007.json (its last heartbeat) and failure-0007.json (why it ended). A rank
that stalled also leaves rank-0007.stack (its stacks), and flight-7 and flight-gloo-7 (the last collectives of NCCL and
of gloo). The run leaves outcome.json (how it ended).
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.format.printable import count_of
from finetune.ranks.flight_reading import Flight, flight_lines, missed, read_flight
from finetune.ranks.heartbeats import is_dead
from finetune.ranks.log import listed, ranks_named

OLD_S = 60.0
"""A rank whose last heartbeat is older than this is silent."""
SHOWN = 12
_KINDS: Mapping[str, Any] = {
    "time": (int, float),
    "step": int | None,
    "stage": str,
    "samples": list,
    "host": str,
    "message": str,
    "kind": str,
    "outcome": str,
}
_LATEST = 1e12
"""Seconds since 1970. A later time can only come from a damaged file."""


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """The files that one rank left."""

    rank: int
    beat: Mapping[str, Any] = field(default_factory=dict)
    failure: Mapping[str, Any] = field(default_factory=dict)
    stack: str = ""
    log_end: str = ""
    flight: Flight = field(default_factory=Flight)
    damaged: tuple[str, ...] = ()
    """The names of its files that could not be read."""


def is_run(folder: Path) -> bool:
    """Return whether a folder is the folder of a run."""
    return (folder / "config.yaml").is_file()


def read_traces(logs: Path) -> list[RankTrace]:
    """Read the files that every rank left, in order of rank."""
    ranks = {
        int(match[1])
        for path in logs.iterdir()
        if (match := re.match(r"(?:rank|failure|flight(?:-gloo)?)-(\d+)", path.name))
    }
    return [_trace(logs, rank) for rank in sorted(ranks)]


def _trace(logs: Path, rank: int) -> RankTrace:
    log, flight = logs / f"rank-{rank:04d}.log", read_flight(logs, rank)
    paths = (logs / f"rank-{rank:04d}.json", logs / f"failure-{rank:04d}.json")
    beat, failure = (_json(path, needed=needed) for path, needed in zip(paths, ((), ("time",)), strict=True))
    return RankTrace(
        rank=rank,
        beat=beat or {},
        failure=failure or {},
        stack=_text(logs / f"rank-{rank:04d}.stack"),
        log_end="\n".join(_text(log).splitlines()[-3:]),
        flight=flight,
        damaged=(
            *(path.name for path, tree in zip(paths, (beat, failure), strict=True) if tree is None),
            *flight.damaged,
        ),
    )


def _json(path: Path, *, needed: Sequence[str] = ()) -> dict[str, Any] | None:
    """Read a file of a rank. Return {} if there is none, and None if it is damaged, for example cut off."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or not tree.keys() >= set(needed):
        return None
    is_sound = all(isinstance(tree[key], kinds) for key, kinds in _KINDS.items() if key in tree)
    return tree if is_sound and abs(tree.get("time", 0.0)) < _LATEST else None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def page(folder: Path, *, now: float | None = None) -> tuple[list[str], bool]:
    """Return the lines of the page, and whether anything is wrong."""
    logs = folder / "logs"
    now = time.time() if now is None else now
    traces = read_traces(logs) if logs.is_dir() else []
    outcome = _json(logs / "outcome.json")
    damaged = [name for trace in traces for name in trace.damaged] + (["outcome.json"] if outcome is None else [])
    outcome = outcome or {}
    if not traces:
        return [
            f"{folder}: no rank has left anything in {logs}: the run never started, or its logs are elsewhere"
        ], True
    ending = f"outcome {outcome.get('outcome', 'none: the run did not end by itself')}"
    lines = [f"{folder}: {count_of(len(traces), 'rank')}, {ending}"]
    verdict = list(_verdict(traces, outcome, now))
    lines += ["", *(verdict or ["the ranks report nothing wrong"]), ""]
    lines += [f"damaged, and ignored: {listed(damaged)}", ""] if damaged else []
    lines += ["rank  host            step  stage                last seen  collective / samples"]
    lines += [_row(trace, now) for trace in traces]
    for trace in traces:
        lines += _details(trace)
    return lines, bool(verdict)


def _verdict(traces: list[RankTrace], outcome: Mapping[str, Any], now: float) -> Iterator[str]:
    """Yield sentences, the likeliest cause first, each with a remedy."""
    failed = sorted(
        (t for t in traces if t.failure), key=lambda t: (t.failure.get("kind") == "lost", t.failure["time"])
    )
    if failed:
        first = failed[0]
        yield (
            f"rank {first.rank} on {first.failure.get('host', '?')} ended first ({first.failure.get('kind')}): "
            f"{first.failure.get('message', '')}"
        )
        lost = [t.rank for t in failed[1:]]
        if lost:
            yield f"{ranks_named(lost)} ended after it: look at rank {first.rank} first"
    if outcome.get("outcome") in ("done", "preempted", "guarded"):
        return
    dead = _dead(traces) if not failed or failed[0].failure.get("kind") == "lost" else []
    for trace in dead:
        yield (
            f"rank {trace.rank} is dead: its process {trace.beat['pid']} on {trace.beat['host']} ended without a "
            f"message. It was probably killed, perhaps because memory ran out: look at the kernel's log (dmesg)"
        )
    traces = [trace for trace in traces if trace not in dead]
    silent = [t for t in traces if not t.failure and t.beat and now - float(t.beat.get("time", now)) > OLD_S]
    if silent and failed:
        yield (
            f"{ranks_named([t.rank for t in silent])} left no message: killed from outside, or cut off. If memory ran "
            f"out, the kernel's log of {listed(sorted({str(t.beat.get('host')) for t in silent}))} says so"
        )
    yield from _behind(traces)
    yield from _odd_stack(traces)
    yield from missed({trace.rank: trace.flight for trace in traces})
    if silent and not failed and len(silent) == sum(bool(trace.beat) for trace in traces):
        yield "no rank has written for a minute, and none left a message: the machine or job was stopped from outside"


def _dead(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """Return the ranks of this machine whose processes ended without leaving a reason."""
    return [trace for trace in traces if not trace.failure and is_dead(trace.beat)]


def _behind(traces: list[RankTrace]) -> Iterator[str]:
    """Name the ranks that are in a different step or stage from most ranks, which wait for them."""
    places = {t.rank: (t.beat.get("step"), t.beat.get("stage")) for t in traces if t.beat}
    if len(set(places.values())) < 2:
        return
    usual, _ = Counter(places.values()).most_common(1)[0]
    for rank, (step, stage) in places.items():
        if (step, stage) != usual:
            samples = next(t for t in traces if t.rank == rank).beat.get("samples") or []
            reading = f"; its samples: {', '.join(map(str, samples[:4]))}" if samples else ""
            yield (
                f"rank {rank} is in step {step}, {stage}; most ranks are in step {usual[0]}, {usual[1]}, and wait for "
                f"it{reading}. See its stack below"
            )


def _odd_stack(traces: list[RankTrace]) -> Iterator[str]:
    """Name the ranks whose main thread is in a different innermost frame from most ranks."""
    tops = {t.rank: top for t in traces if (top := _top(t.stack))}
    if len(tops) < 2 or len(set(tops.values())) == 1:
        return
    usual, _ = Counter(tops.values()).most_common(1)[0]
    for rank, top in tops.items():
        if top != usual:
            yield f"rank {rank} is in {top}, the others are in {usual}"


def _top(stack: str) -> str:
    """Return the innermost frame of our own code, or else the innermost frame of all."""
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stack.rpartition("most recent call first")[2])
    ours = [f for f in frames if re.search(r"/(finetune|moe|data)/", f[0])]
    if not frames:
        return ""
    file, line, name = (ours or frames)[0]
    return f"{name} ({Path(file).name}:{line})"


def _row(trace: RankTrace, now: float) -> str:
    beat = trace.beat
    seen = f"{now - float(beat['time']):.0f} s ago" if "time" in beat else "never"
    what = beat.get("collective") or ", ".join(map(str, (beat.get("samples") or [])[:3]))
    return (
        f"{trace.rank:>4}  {str(beat.get('host', '?')):<14}  {str(beat.get('step', '-')):>4}  "
        f"{str(beat.get('stage', '-')):<19}  {seen:>9}  {what}"
    )


def _details(trace: RankTrace) -> Iterator[str]:
    if trace.flight.entries:
        yield f"\nrank {trace.rank}, last collectives:"
        yield from flight_lines(trace.flight)
    if trace.stack:
        frames = trace.stack.rpartition("most recent call first")[2].strip(" ):\n").splitlines()
        yield f"\nrank {trace.rank}, stack, innermost first:"
        yield from frames[:SHOWN]
    if trace.failure and trace.log_end:
        yield f"\nrank {trace.rank}, the end of its log:"
        yield from trace.log_end.splitlines()

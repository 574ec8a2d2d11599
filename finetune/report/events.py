"""The events of a run and its time by phase, from the log of rank 0."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from data.format.printable import one_line
from finetune.report.curves import number
from finetune.report.files import RunFiles

MOST = 200
"""The most events that are shown; of more, the first and the last."""
MOST_CHARACTERS = 600
"""The most characters of an event that are shown."""
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}) (.*)")
_KINDS = (
    ("warning", re.compile(r"warning: ")),
    ("bad sample", re.compile(r"left out(?: of the evaluation)?: ")),
    ("preempted", re.compile(r"stopped by SIG\w+ ")),
    ("resumed", re.compile(r"resumed: ")),
    ("stage", re.compile(r"from step \d+, stage ")),
    ("guard", re.compile(r"guard \S+: ")),
    ("stopped", re.compile(r"stopped(?:: | \()")),
    ("failed", re.compile(r"failed \(\w+\): ")),
    ("best", re.compile(r"best \S+ so far: ")),
    ("note", re.compile(r"(?:took over |not asked: |the evaluation at step \d+ was interrupted)")),
)
_PHASES = (
    ("start", re.compile(r"--- (?:base and empty model|data|weights and engine|resume)$")),
    ("checkpoints", re.compile(r"--- checkpoint after ")),
    ("result", re.compile(r"--- writing the result$")),
    ("", re.compile(r"(?:--- evaluation$|from step \d+|checkpoint: |step \d+: |adapter: |model: |stopped by SIG)")),
)
"""The lines that begin a phase; those of the last kind end one, because other records know the time that follows."""


def log_lines(log: Sequence[str]) -> Iterator[tuple[datetime, str]]:
    """Yield the time and the text of each message; only the first line of one that has several."""
    for line in log:
        if found := _LINE.fullmatch(line):
            try:
                yield datetime.fromisoformat(found[1]), found[2]
            except ValueError:  # digits that are no date
                continue


def events(files: RunFiles) -> dict[str, Any]:
    """Return the events of all starts in order, and how often each kind occurs."""
    found = [
        {"time": time.isoformat(sep=" ", timespec="seconds"), "kind": kind, "text": one_line(text)[:MOST_CHARACTERS]}
        for time, text in log_lines(files.log)
        if (kind := _kind(text))
    ]
    counts: dict[str, int] = {}
    for event in found:
        counts[event["kind"]] = counts.get(event["kind"], 0) + 1
    shown = found if len(found) <= MOST else found[: MOST // 2] + found[-MOST // 2 :]
    return {"shown": shown, "counts": counts, "left_out": len(found) - len(shown)}


def _kind(text: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.match(text)), "")


def phases(files: RunFiles) -> list[tuple[str, float]]:
    """Return the seconds of all starts by phase: from the records of steps and evaluations, and else from the log."""
    seconds: dict[str, float] = {}
    phase, since = "", None
    for time, text in log_lines(files.log):
        named = next((name for name, pattern in _PHASES if pattern.match(text)), None)
        if named is None:
            continue
        if phase and since is not None:
            seconds[phase] = seconds.get(phase, 0.0) + max(0.0, (time - since).total_seconds())
        phase, since = named, time
    steps = _sum(files.metrics, "seconds")
    waited = min(steps, _sum(files.metrics, "seconds_data"))
    parts = [
        ("start", seconds.get("start", 0.0)),
        ("steps, computing", steps - waited),
        ("steps, waiting for data", waited),
        ("evaluations", _sum(files.evaluations, "seconds")),
        ("checkpoints", seconds.get("checkpoints", 0.0)),
        ("result", seconds.get("result", 0.0)),
    ]
    return [(name, round(value, 3)) for name, value in parts if value > 0]


def _sum(records: Sequence[Any], name: str) -> float:
    values = [number(record.get(name)) for record in records]
    return sum(value for value in values if value == value)

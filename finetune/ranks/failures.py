"""What ended a run, for people: the message of the rank that failed first, not of those that only lost it.

Each failing rank leaves `logs/failure-0007.json`; a run that ends otherwise leaves `logs/outcome.json`. No torch here:
the launcher reads both.
"""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from finetune.ranks.log import RankLog

Kind = Literal["input", "failed", "lost", "stall"]
Outcome = Literal["done", "preempted", "problems"]
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket closed",
    "remote process exited",
    "communicator was aborted",
)
"""What a backend says when the rank at the other end is gone."""
FAILED_S = 0.5
"""Seconds a failing rank waits before it looks for one that failed before it."""
LOST_S = 3.0
"""Seconds a rank waits after losing a peer, so that the peer's own error is reported first."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why one rank ended."""

    rank: int
    host: str
    time: float
    kind: Kind
    message: str

    @property
    def code(self) -> int:
        """The rank's exit code."""
        return 2 if self.kind == "input" else 1


def keep_failure(log: RankLog, kind: Kind, message: str) -> Failure:
    """Write down why this rank ends."""
    failure = Failure(rank=log.rank, host=socket.gethostname(), time=time.time(), kind=kind, message=message)
    log.note(f"failed ({kind}): {message}")
    (log.folder / f"failure-{log.rank:04d}.json").write_text(json.dumps(asdict(failure)))
    return failure


def forget_failure(log: RankLog) -> None:
    """Remove what ended the start before."""
    (log.folder / f"failure-{log.rank:04d}.json").unlink(missing_ok=True)
    if log.rank == 0:
        (log.folder / "outcome.json").unlink(missing_ok=True)


def first_failure(folder: Path, *, since: float) -> Failure | None:
    """Return the earliest failure of a start; one that only lost another rank comes last."""
    failures = []
    for path in folder.glob("failure-*.json"):
        try:
            failures.append(Failure(**json.loads(path.read_text())))
        except json.JSONDecodeError:  # being written
            continue
    fresh = [failure for failure in failures if failure.time >= since]
    return min(fresh, key=lambda failure: (failure.kind == "lost", failure.time, failure.rank), default=None)


def keep_outcome(log: RankLog, outcome: Outcome, step: int | None) -> None:
    """Write down that a run ended well, or should be started again; `step` is None if no step was begun."""
    partial = log.folder / f"outcome-{log.rank:04d}.new"
    partial.write_text(json.dumps({"outcome": outcome, "step": step, "time": time.time()}))
    partial.replace(log.folder / "outcome.json")  # complete at any time: several ranks may write it


def outcome_since(folder: Path, since: float) -> str:
    """Return the outcome of a start, or nothing."""
    path = folder / "outcome.json"
    record = json.loads(path.read_text()) if path.exists() else {"time": 0.0}
    return str(record["outcome"]) if record["time"] >= since else ""


def report_failure(log: RankLog, error: BaseException, *, since: float) -> Failure:
    """Write a failure down, and print it unless another rank failed before: then that rank's message is the cause."""
    log.note("".join(traceback.format_exception(error)).rstrip())
    text = str(error) or type(error).__name__
    is_lost = isinstance(error, RuntimeError) and any(words in text for words in LOST)
    kind: Kind = "input" if isinstance(error, ValueError) else "lost" if is_lost else "failed"
    failure = keep_failure(log, kind, text)
    time.sleep(LOST_S if is_lost else FAILED_S)
    first = first_failure(log.folder, since=since) or failure
    if first.rank == log.rank:
        words = f"another rank is gone: {text.splitlines()[0]}" if is_lost else text
        log.shout(f"moetune train, rank {log.rank}: {words}")
        if kind == "failed":
            log.shout(f"the traceback is in {log.path}")
    return failure


def end_at_failure(log: RankLog, *, since: float) -> Callable[..., None]:
    """Return a hook for `sys.excepthook`: the rank ends at once, so that no library's clean-up waits for dead ranks."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failure = report_failure(log, error, since=since)
        sys.stdout.flush()
        os._exit(failure.code)

    return hook

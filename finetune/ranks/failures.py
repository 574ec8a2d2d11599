"""What ended a run, for people: the message of the rank that failed first, and not of those that only lost it.

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
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed",
    "remote process exited", "communicator was aborted",
)  # fmt: skip
"""What a backend says when the rank at the other end is gone."""
SETTLE_S = 0.5
"""So long a failing rank looks for one that failed before it."""
LOST_S = 3.0
"""So long a rank that only lost another one lets it be found out; its launcher then ends this one as well."""


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
    """A new start: what ended the one before is history."""
    (log.folder / f"failure-{log.rank:04d}.json").unlink(missing_ok=True)
    if log.rank == 0:
        (log.folder / "outcome.json").unlink(missing_ok=True)


def first_failure(folder: Path, *, since: float) -> Failure | None:
    """Return the earliest failure of a start; one that only lost another rank comes last."""
    found = []
    for path in folder.glob("failure-*.json"):
        try:
            found.append(Failure(**json.loads(path.read_text())))
        except json.JSONDecodeError:  # being written
            continue
    fresh = [failure for failure in found if failure.time >= since]
    return min(fresh, key=lambda failure: (failure.kind == "lost", failure.time, failure.rank), default=None)


def keep_outcome(log: RankLog, outcome: Outcome, step: int | None) -> None:
    """Write down that a run ended well, or shall be started again; None where no step was begun."""
    beside = log.folder / f"outcome-{log.rank:04d}.new"
    beside.write_text(json.dumps({"outcome": outcome, "step": step, "time": time.time()}))
    beside.replace(log.folder / "outcome.json")  # whole at any time: several ranks may have the same to say


def outcome_since(folder: Path, since: float) -> str:
    """Return the outcome of a start, or nothing."""
    path = folder / "outcome.json"
    found = json.loads(path.read_text()) if path.exists() else {"time": 0.0}
    return str(found["outcome"]) if found["time"] >= since else ""


def report_failure(log: RankLog, error: BaseException, *, since: float) -> Failure:
    """Keep it, and say it on the terminal unless another rank failed before; that one's message is the cause."""
    log.note("".join(traceback.format_exception(error)).rstrip())
    text = str(error) or type(error).__name__
    lost = isinstance(error, RuntimeError) and any(words in text for words in LOST)
    kind: Kind = "input" if isinstance(error, ValueError) else "lost" if lost else "failed"
    failure = keep_failure(log, kind, text)
    time.sleep(LOST_S if lost else SETTLE_S)
    first = first_failure(log.folder, since=since) or failure
    if first.rank == log.rank:
        words = f"another rank is gone: {text.splitlines()[0]}" if lost else text
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

"""The state of a run: whether it works, how its last start ended, and the message of a failed one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.format.printable import printable
from finetune.checkpoint.run_lock import holder_of
from finetune.ranks.failures import first_failure
from finetune.report.files import read_object

Word = Literal["running", "done", "preempted", "guarded", "failed", "ended"]
STALL_SECONDS = 1800.0
"""Seconds without a heartbeat after which a start on another machine counts as dead, if the run names no limit."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run in a word, with the message of a run that did not finish."""

    word: Word
    message: str = ""


def state_of(folder: Path, *, stall_seconds: object = None) -> State:
    """Return the state of the run in a folder; `stall_seconds` is its run.stall_seconds."""
    logs = folder / "logs"
    outcome = read_object(logs / "outcome.json").get("outcome")
    if outcome == "done":
        return State(word="done")
    if outcome == "preempted":
        return State(word="preempted", message="A signal ended it after a save. The same command continues it.")
    if outcome == "guarded":
        return State(word="guarded", message="A guard stopped it. The same command continues it with another bound.")
    failure = first_failure(logs, start="")
    if failure is not None:
        return State(word="failed", message=printable(f"rank {failure.rank}: {failure.message}"))
    limit = float(stall_seconds) if isinstance(stall_seconds, int | float) else STALL_SECONDS
    if holder_of(folder, stall_seconds=limit) is not None:
        return State(word="running")
    return State(word="ended", message=f"It ended without a message. `moetune doctor {folder}` looks for the reason.")

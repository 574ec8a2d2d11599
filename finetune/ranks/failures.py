"""The reason why a run ended: the message of the rank that failed first, not of ranks that only lost it.

Each failing rank leaves `logs/failure-0007.json`; a run that ends otherwise leaves `logs/outcome.json`. Loads no torch,
because the launcher reads both.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from finetune.ranks.causes import told
from finetune.ranks.log import LAUNCHER_LOGS, RankLog

Kind = Literal["input", "failed", "killed", "lost", "stall", "interrupted"]
Outcome = Literal["done", "preempted", "guarded"]
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket closed",
    "remote process exited",
    "communicator was aborted",
)
"""Texts in the errors of a backend when the rank at the other end is gone."""
FAILED_S = 0.5
"""Seconds a failing rank waits before it looks for a rank that failed earlier."""
LOST_S = 3.0
"""Seconds a rank waits after losing a peer, so that the peer's own error is reported first."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The reason why one rank ended."""

    rank: int
    host: str
    time: float
    kind: Kind
    message: str
    start: str
    """The start that it ended; times do not tell, because a clock may have been set back."""

    @property
    def code(self) -> int:
        """The exit code of the rank."""
        return {"input": 2, "interrupted": 128 + signal.SIGINT}.get(self.kind, 1)


def meeting(environment: Mapping[str, str]) -> str:
    """Return a name that all ranks of one start have in common, and that no restart shares.

    A start with a store of its own has a port of its own. Its count of restarts is then left out, because a machine
    that starts again only because another one did does not count that restart.
    """
    names = ["MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"]
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "False":
        names.append("TORCHELASTIC_RESTART_COUNT")
    return " ".join(environment.get(name, "-") for name in names)


def keep_failure(log: RankLog, kind: Kind, message: str) -> Failure:
    """Record why this rank ends."""
    failure = Failure(
        rank=log.rank,
        host=socket.gethostname(),
        time=time.time(),
        kind=kind,
        message=message,
        start=meeting(os.environ),
    )
    log.note(f"failed ({kind}): {message}")
    write_failure(log.folder, failure)
    return failure


def write_failure(logs: Path, failure: Failure) -> None:
    """Write a failure where the other ranks and the launcher look; if the disk is full, the launcher finds that out."""
    with suppress(OSError):
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"failure-{failure.rank:04d}.json").write_text(json.dumps(asdict(failure)))


def forget_failure(log: RankLog) -> None:
    """Remove the failure of an earlier start; rank 0 also removes those of ranks that this start does not have."""
    for path in log.folder.glob("failure-*.json" if log.rank == 0 else f"failure-{log.rank:04d}.json"):
        failure = _read(path)
        if failure is None or failure.start != meeting(os.environ):
            path.unlink(missing_ok=True)
    if log.rank == 0:
        (log.folder / "outcome.json").unlink(missing_ok=True)


def ranks_here(rank: int) -> range:
    """Return the ranks that the launcher of this rank has started on this machine."""
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")  # torchrun's, or DeepSpeed's
    return range(first, first + int(size))


def first_failure(folder: Path, *, start: str, ranks: Container[int] | None = None) -> Failure | None:
    """Return the earliest failure of a start, given its meeting or a part of that; lost ranks come last.

    `ranks` limits the search to some of the ranks.
    """
    failures = [failure for path in folder.glob("failure-*.json") if (failure := _read(path)) is not None]
    ours = [failure for failure in failures if start in failure.start and (ranks is None or failure.rank in ranks)]
    return min(ours, key=lambda failure: (failure.kind == "lost", failure.time, failure.rank), default=None)


def _read(path: Path) -> Failure | None:
    """Read a failure; return None if it is still being written, or was cut off by a full disk."""
    try:
        return Failure(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def keep_outcome(log: RankLog, outcome: Outcome, step: int | None) -> None:
    """Record that a run ended well, or should be started again; `step` is None if no step has begun."""
    log.folder.mkdir(parents=True, exist_ok=True)  # a user may have removed it meanwhile
    partial = log.folder / f"outcome-{log.rank:04d}.new"
    record = {"outcome": outcome, "step": step, "time": time.time(), "start": meeting(os.environ)}
    partial.write_text(json.dumps(record))
    partial.replace(log.folder / "outcome.json")  # always complete, although several ranks may write it


def outcome_of(folder: Path, start: str) -> str:
    """Return the outcome of a start, given its meeting or a part of that; "" if it left none."""
    try:
        record = json.loads((folder / "outcome.json").read_text())
        return str(record["outcome"]) if start in record["start"] else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def report_failure(log: RankLog, error: BaseException) -> Failure:
    """Record a failure, with its traceback in the log, and print it."""
    log.note("".join(traceback.format_exception(error)).rstrip())
    text = str(error) or type(error).__name__
    is_lost = isinstance(error, RuntimeError) and any(words in text for words in LOST)
    kind: Kind = "input" if isinstance(error, ValueError) else "lost" if is_lost else "failed"
    if kind == "failed":
        text = told(text, place=f"GPU {os.environ.get('LOCAL_RANK', '0')} of {socket.gethostname()}")
    failure = keep_failure(log, kind, text)
    words = f"another rank is gone: {text.splitlines()[0]}" if is_lost else text
    tell(log, failure, words + (f"\nthe traceback is in {log.path}" if kind == "failed" else ""))
    return failure


def tell(log: RankLog, failure: Failure, text: str) -> None:
    """Print why the run ends, once on each machine: its rank that failed first prints the cause, its own or another's.

    Ranks of `moetune train` print nothing: the command shows the message of the first when all have ended.
    """
    time.sleep(LOST_S if failure.kind == "lost" else FAILED_S)
    first = first_failure(log.folder, start=failure.start) or failure
    speaker = first_failure(log.folder, start=failure.start, ranks=ranks_here(log.rank)) or failure
    if speaker.rank != log.rank or LAUNCHER_LOGS in os.environ:
        return
    if first.rank != log.rank:
        text = f"rank {first.rank} on {first.host} failed first: {first.message}"
    log.shout(f"moetune train, rank {log.rank}: {text}")


def report_early(rank: int, error: Exception) -> int:
    """Report an error that ends a rank before it has a log of its own, and return the exit code.

    The error is usually the same on all ranks. So the first rank of a host reports it at once, and the launcher then
    ends the others.
    """
    if logs := os.environ.get(LAUNCHER_LOGS):
        log = RankLog(Path(logs), rank)
        code = report_failure(log, error).code
        log.close()
        return code
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LOST_S)
    sys.stderr.write(f"moetune train, rank {rank}: {error}\n")
    return 2 if isinstance(error, ValueError) else 1


def end_at_failure(log: RankLog) -> Callable[..., None]:
    """Return a `sys.excepthook` that ends the rank at once, so that no library's clean-up waits for dead ranks."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failure = report_failure(log, error)
        sys.stdout.flush()
        os._exit(failure.code)

    return hook

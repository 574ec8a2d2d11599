"""One start at a time works in a run's folder: rank 0 holds `lock.json` there, and the other ranks wait for it."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from data.prepare.folder_lock import (
    Holder,
    living_holder,
    process_start,
    read_holder,
    release,
    take,
    this_process,
)
from finetune.ranks.failures import meeting

LOCK = "lock.json"
LOOK_S = 0.1
WAIT_S = 600.0
"""Seconds that ranks wait for rank 0 to take the lock. If it cannot, it ends, and the launcher ends the rest."""


def take_run(folder: Path, *, stall_seconds: float, say: Callable[[str], None]) -> Callable[[], None]:
    """Hold the run's folder before anything is written there; every rank must call this, and rank 0 takes the lock.

    Returns a function that releases it.
    """
    mine = this_process(launch=launch_id(os.environ, os.getppid()), meeting=meeting(os.environ))
    if int(os.environ.get("RANK", "0")) == 0:
        holder = read_holder(folder / LOCK)
        if holder is not None and holder.meeting == os.environ.get("TORCHELASTIC_RUN_ID"):  # our launcher
            release(folder / LOCK, holder)
        return _take(folder, mine, stall_seconds=stall_seconds, say=say)
    deadline, launcher = time.monotonic() + WAIT_S, os.getppid()
    while (holder := read_holder(folder / LOCK)) is None or holder.meeting != mine.meeting:
        if os.getppid() != launcher:
            raise ValueError("the launcher that started this rank is gone")
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank 0 of this start did not take {folder / LOCK} within {WAIT_S:g} s. Every rank must see that "
                f"folder: set run.folder to a folder on a disk that all nodes share"
            )
        time.sleep(LOOK_S)  # polling, because the holder may be on another machine
    return lambda: None


def take_run_for_ranks(
    folder: Path, *, run_id: str, stall_seconds: float, say: Callable[[str], None]
) -> Callable[[], None]:
    """Hold the run's folder in the launcher until rank 0 does: a second start is refused before it has any ranks.

    `run_id` is the id of the torchrun that follows. Returns a function that releases a folder rank 0 never took.
    """
    launch = launch_id(os.environ | {"TORCHELASTIC_RUN_ID": run_id}, os.getpid())
    return _take(folder, this_process(launch=launch, meeting=run_id), stall_seconds=stall_seconds, say=say)


def holder_of(folder: Path, *, run_id: str = "", stall_seconds: float) -> Holder | None:
    """Return the other start that works in the run's folder, if there is one; write nothing.

    `run_id` is the id of the torchrun that this process is about to start, if it is a launcher.
    """
    holder = read_holder(folder / LOCK)
    if holder is None or holder.meeting == os.environ.get("TORCHELASTIC_RUN_ID"):  # our launcher holds it for us
        return None
    ours = os.environ | ({"TORCHELASTIC_RUN_ID": run_id} if run_id else {})
    mine = this_process(launch=launch_id(ours, os.getppid()), meeting=meeting(ours))
    if _was_requeued(holder.launch, mine.launch):
        return None
    return living_holder(folder / LOCK, mine, limit=stall_seconds, last_sign=lambda: _last_heartbeat(folder))


def _take(folder: Path, mine: Holder, *, stall_seconds: float, say: Callable[[str], None]) -> Callable[[], None]:
    holder = read_holder(folder / LOCK)
    if holder is not None and _was_requeued(holder.launch, mine.launch):
        release(folder / LOCK, holder)
    take(
        folder / LOCK,
        mine,
        limit=stall_seconds,
        last_sign=lambda: _last_heartbeat(folder),
        say=say,
        cure="set another run.name",
    )
    return lambda: release(folder / LOCK, mine)


def launch_id(environment: Mapping[str, str], parent: int) -> str:
    """Return an id that all restarts of one start share, and that no other start has."""
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    torchrun = "" if run_id in ("", "none") else f"torchrun {run_id}"  # its default is the same for every start
    if job := environment.get("SLURM_JOB_ID"):  # two of its steps may each start a run
        return f"Slurm job {job}.{environment.get('SLURM_RESTART_COUNT', '0')} {torchrun}".rstrip()
    if torchrun:
        return torchrun
    if "RANK" in environment:  # the launcher; a rank that a user started alone has the user's shell as its parent
        return f"launcher {parent}.{process_start(parent)}"
    return ""


def _was_requeued(earlier: str, launch: str) -> bool:
    """Return whether `earlier` is the same Slurm job before it was queued again: none of its processes is alive."""
    before, now = (re.match(r"Slurm job (\S+)\.(\d+)(?: |$)", text) for text in (earlier, launch))
    return bool(before and now and before[1] == now[1] and int(before[2]) < int(now[2]))


def _last_heartbeat(folder: Path) -> float:
    return max((path.stat().st_mtime for path in (folder / "logs").glob("rank-*.json")), default=0.0)

"""A lock file says which process works in a folder, so that a second one leaves the folder alone.

The kernel's locks (flock) do not reach other machines on every shared disk, and they die with a process that an elastic
restart replaces. A file does neither: it names its holder, and whoever finds it judges whether that holder still lives.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from uuid import uuid4


class FolderInUse(ValueError):
    """Another process works in the folder; the message names it."""


ATTEMPTS = 20
"""Attempts to take a lock that vanishes or changes hands meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    launch: str
    """The launch that started the process. Restarts within one launch share it, on any host."""
    meeting: str
    """The rendezvous of this start's ranks, by which they recognise the lock of their own rank 0."""
    host: str
    boot: str
    namespace: str
    """The namespace of `pid`: containers of one host may each have a process with that number."""
    pid: int
    started: int
    """Start of the process, in the kernel's ticks since boot; process ids are reused."""
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} (started by {self.launch})"


def this_process(launch: str = "", meeting: str = "") -> Holder:
    """Return a record of this process; without a launch it stands for itself."""
    pid = os.getpid()
    started = process_start(pid) or 0
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return Holder(
        launch=launch or f"process {pid}.{started} on {socket.gethostname()}",
        meeting=meeting,
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        namespace=str(Path("/proc/self/ns/pid").readlink()),
        pid=pid,
        started=started,
        since=since,
    )


def process_start(pid: int) -> int | None:
    """Return when a process of this machine started, in ticks since boot; None for one that has ended."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(numbers[18])


def take(
    path: Path, mine: Holder, *, limit: float, last_sign: Callable[[], float], say: Callable[[str], None], cure: str
) -> None:
    """Create the lock, or take it over from a holder that has ended; FolderInUse names a holder that lives.

    `last_sign` returns when the holder's work last showed in the folder. On another host that is all there is to see:
    after `limit` seconds without one the holder counts as dead; a limit of 0 means never.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        now = _create(path, mine)
        if now is None:
            return
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        other = _parse(path, text)
        reason = _why_dead(other, mine, silence=now - max(last_sign(), modified(path)), limit=limit)
        if reason is None:
            raise FolderInUse(f"{path.parent} is in use by {other}. Wait for it to end, or {cure}")
        if _remove(path, text) and reason:
            say(f"took over {path.parent} from {other}: {reason}")
    raise ValueError(f"{path} changes hands again and again; {cure}")


def living_holder(path: Path, mine: Holder, *, limit: float, last_sign: Callable[[], float]) -> Holder | None:
    """Return the holder for whom `take` would leave the folder alone; writes nothing."""
    other = read_holder(path)
    if other is None:
        return None
    silence = time.time() - max(last_sign(), modified(path))
    return other if _why_dead(other, mine, silence=silence, limit=limit) is None else None


def release(path: Path, mine: Holder) -> None:
    """Remove the lock if it is still ours."""
    with suppress(OSError, ValueError):
        text = path.read_text()
        if _parse(path, text) == mine:
            _remove(path, text)


def read_holder(path: Path) -> Holder | None:
    """Return who holds a folder; None where nobody does."""
    try:
        return _parse(path, path.read_text())
    except FileNotFoundError:
        return None


def is_held(path: Path) -> bool:
    """Return whether the holder of a lock may still be at work; one on another host counts as such."""
    holder = read_holder(path)
    return holder is not None and _why_dead(holder, this_process(), silence=0.0, limit=0.0) is None


def _create(path: Path, mine: Holder) -> float | None:
    """Create the lock, complete or not at all; or return the time by the file system where one exists."""
    beside = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with beside.open("x") as file:
            file.write(json.dumps(asdict(mine), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP):
                raise
            with path.open("x") as file:  # a file system without links
                file.write(beside.read_text())
    except FileExistsError:
        return modified(beside)
    finally:
        beside.unlink(missing_ok=True)
    return None


def _parse(path: Path, text: str) -> Holder:
    with suppress(ValueError, TypeError):
        holder = Holder(**json.loads(text))
        if all(isinstance(getattr(holder, field.name), int if field.type is int else str) for field in fields(holder)):
            return holder
    raise ValueError(f"{path} is not a lock that moetune wrote. Remove it if nothing uses that folder")


def _why_dead(other: Holder, mine: Holder, *, silence: float, limit: float) -> str | None:
    """Say why a lock may be taken over, with nothing to say for a restart of one launch; None where it may not."""
    same_boot = other.boot == mine.boot
    if other.host == mine.host and (other.namespace == mine.namespace or not same_boot):
        if same_boot and process_start(other.pid) == other.started:
            return None
        return "" if other.launch == mine.launch else "that process has ended"
    if other.launch == mine.launch:
        return ""
    if limit and silence > limit:
        return f"nothing was written there for {silence:.0f} s, and the limit is {limit:g} s"
    return None


def _remove(path: Path, text: str) -> bool:
    """Remove the lock that says `text`; another's that took its place meanwhile is put back."""
    aside = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    try:
        if aside.read_text() == text:
            return True
        with suppress(OSError):
            os.link(aside, path)
        return False
    finally:
        aside.unlink(missing_ok=True)


def modified(path: Path) -> float:
    """Return when a file was written last; 0 for one that is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

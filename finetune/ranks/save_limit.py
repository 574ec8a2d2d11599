"""The time limit of a rank in a save: its own files must grow, or another rank must be working."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path


class SaveState(Enum):
    """The states of a rank in a save, each with a limit of its own."""

    WORKING = "it works on a file of its own"
    WAITING = "it waits for others"
    IDLE_ONCE = "it waits, and at the last check no other rank was working"


PATIENCE = {SaveState.WORKING: 8.0, SaveState.WAITING: 1.0, SaveState.IDLE_ONCE: 0.5}
"""The length of each state, in limits of a step. WORKING starts again with every byte that arrives on the disk. It may
last longer than the others, because the disk may still be flushing the bytes that it has taken."""


class SaveLimit:
    """One rank's limit in a save, as a state machine.

        work(True)  --> WORKING    -- 8 limits without a new byte -----> passed
        work(False) --> WAITING    -- a limit, another rank works -----> WAITING
                                   -- a limit, no other works ---------> IDLE_ONCE
                        IDLE_ONCE  -- half a limit, another works -----> WAITING
                                   -- half a limit, still none works --> passed

    It checks twice, because a rank that has just begun to work may not have said so yet. The rank itself calls `begin`
    and `work`; another thread calls `passed`.
    """

    def __init__(self, limit: float, *, another_works: Callable[[], bool]) -> None:
        self.state = SaveState.WAITING
        self._limit, self._another_works = limit, another_works
        self._since = time.monotonic()
        self._folder: Path | None = None
        self._looked_at = 0.0
        self._content: object = None
        self._lock = threading.Lock()

    @property
    def is_working(self) -> bool:
        """True while this rank works on a file of its own."""
        return self.state is SaveState.WORKING

    def begin(self, folder: Path) -> None:
        """Begin a save that writes into `folder`."""
        self._folder = folder
        self._looked_at, self._content = time.monotonic(), None
        self.work(self.is_working)

    def work(self, is_working: bool) -> None:
        """Note that the rank now works on a file of its own, or waits for others."""
        with self._lock:
            self.state, self._since = SaveState.WORKING if is_working else SaveState.WAITING, time.monotonic()

    def add_pause(self, seconds: float) -> None:
        """Do not count time during which the process was suspended."""
        self._since += seconds

    def passed(self) -> float:
        """Return the limit that this rank has passed, in seconds; 0 while it may go on."""
        state = self.state
        if state is SaveState.WORKING:
            self._see_growth()
        limit = self._limit * PATIENCE[state]
        if not limit or time.monotonic() - self._since <= limit:
            return 0.0
        if state is SaveState.WORKING:
            return limit
        if self._another_works():
            self._move(state, SaveState.WAITING)
        elif state is SaveState.WAITING:
            self._move(state, SaveState.IDLE_ONCE)
        else:
            return self._limit
        return 0.0

    def _move(self, before: SaveState, after: SaveState) -> None:
        """Change the state, unless the rank itself has changed it meanwhile."""
        with self._lock:
            if self.state is before:
                self.state, self._since = after, time.monotonic()

    def _see_growth(self) -> None:
        """Start the time again if the folder has changed; look at it as rarely as the limit allows."""
        if self._folder is None or not self._limit or time.monotonic() - self._looked_at < self._limit:
            return
        content = _content(self._folder)
        if content != self._content:
            self._since = time.monotonic()
        self._looked_at, self._content = time.monotonic(), content


def _content(folder: Path) -> object:
    """List the files of a run's checkpoints: the list changes if a file grows, is renamed or is removed."""
    entries = []
    with suppress(OSError):  # a file is being renamed or removed: the next look sees the rest
        for path in sorted(folder.glob("*/*")):
            entries.append((path.parent.name, path.name, path.stat().st_size))
    return entries

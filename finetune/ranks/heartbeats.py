"""Heartbeats: small files in the run's logs, by which ranks know of each other when no collective returns.

Each rank repeatedly writes where it is, and watches only the rank after it. A silent rank has a living rank before it,
unless all are silent. So 256 ranks ask one file system for 256 files at a time, not for 65,536.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.ranks.failures import ranks_here
from finetune.ranks.log import RankLog

INTERVAL_S = 10.0
"""Seconds between heartbeats. A change of stage is written immediately."""
PER_LIMIT = 4
"""The least number of heartbeats within the time after which a rank counts as silent."""
LAST_STAGES = ("ended", "failed")
"""The stages of a rank that writes no more heartbeats."""
SHOWN = 4


class Heartbeats:
    """The heartbeats of this rank, and those that it reads of others."""

    def __init__(self, log: RankLog, *, limit: float) -> None:
        self.interval = min(INTERVAL_S, limit / PER_LIMIT) if limit else INTERVAL_S
        self._rank, self._limit = log.rank, limit
        self._path = log.path.with_suffix(".json")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self._next = self._path_of((log.rank + 1) % world) if world > 1 else None
        self._next_mark = self._mark_of_next()  # a file left by an earlier start does not count
        self._next_heard = float("inf")
        self._written, self._can_write = 0.0, True

    def _path_of(self, rank: int) -> Path:
        return self._path.with_name(f"rank-{rank:04d}.json")

    def _mark_of_next(self) -> int:
        """Return when the next rank's file was written, by the clock of the file system; 0 if there is none."""
        try:
            return self._next.stat().st_mtime_ns if self._next else 0
        except OSError:
            return 0

    def is_due(self) -> bool:
        """Return whether it is time to write again."""
        return time.monotonic() - self._written >= self.interval

    def write_soon(self) -> None:
        """Make the next heartbeat due now, because the work of the rank has changed."""
        self._written = 0.0

    def write(self, here: Mapping[str, Any]) -> None:
        """Write where this rank is. On a full disk, only set the time of the file: that needs no space."""
        self._written = time.monotonic()
        beat = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **here}
        partial = self._path.with_suffix(".json.new")
        try:
            partial.write_text(json.dumps(beat))
            partial.replace(self._path)
            self._can_write = True
        except FileNotFoundError:  # a dry run, or a user, has removed the folder
            self._can_write = False
        except OSError:
            self._can_write = False
            with suppress(OSError):
                os.utime(self._path)

    def add_silence(self, seconds: float) -> None:
        """Do not count time during which this process itself was suspended and could read no heartbeat."""
        self._next_heard += seconds

    def silent_rank(self) -> str:
        """Describe the next rank if it has been silent for longer than the limit; "" otherwise.

        A rank that has never written in this start is handled elsewhere: the meeting of all ranks has its own limit. A
        rank that cannot write its own heartbeat does not judge others.
        """
        now, mark = time.monotonic(), self._mark_of_next()
        if mark != self._next_mark:
            self._next_mark, self._next_heard = mark, now if mark else float("inf")
        if not self._limit or not self._next or not self._can_write or now - self._next_heard <= self._limit:
            return ""
        beat = read_beat(self._next)
        return "" if beat is None or beat["stage"] in LAST_STAGES else _described(beat)

    def slowest(self) -> list[str]:
        """Describe the other ranks that are farthest behind, or have been silent longest."""
        beats = self._others()
        beats.sort(key=lambda beat: (beat["step"] if beat["step"] is not None else -1, beat["time"]))
        return [_described(beat) for beat in beats[:SHOWN]]

    def another_works(self) -> bool:
        """Return whether any other rank is alive and says that it works on a file of its own."""
        alive_s = max(self._limit, 2 * self.interval)
        return any(beat.get("busy") and time.time() - beat["time"] < alive_s for beat in self._others())

    def dead_neighbours(self) -> list[int]:
        """Return the ranks of this start, on this machine, that ended without saying so."""
        beats = [read_beat(self._path_of(rank)) for rank in ranks_here(self._rank)]
        return [beat["rank"] for beat in beats if beat and is_dead(beat)]

    def _others(self) -> list[dict[str, Any]]:
        """Read the last heartbeat of every other rank that has left one."""
        beats = [read_beat(path) for path in sorted(self._path.parent.glob("rank-*.json"))]
        return [beat for beat in beats if beat and beat["rank"] != self._rank]


def read_beat(path: Path) -> dict[str, Any] | None:
    """Read the last heartbeat of a rank; return None if there is no complete one."""
    try:
        beat: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return beat


def _described(beat: Mapping[str, Any]) -> str:
    ago = time.time() - beat["time"]
    return f"rank {beat['rank']}, {beat['host']}: step {beat['step']}, {beat['stage']}, {ago:.0f} s ago"


def is_dead(beat: Mapping[str, Any]) -> bool:
    """Return whether the rank of this heartbeat ended without saying so; False if it ran on another machine."""
    is_here = beat.get("host") == socket.gethostname() and "pid" in beat
    return is_here and beat.get("stage") != "ended" and not _is_alive(beat["pid"])


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

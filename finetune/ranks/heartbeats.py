"""How the ranks of a run know of each other when no collective returns: a small file of each, in the run's logs.

Each rank writes where it is, again and again, and watches the one rank after it: whoever is silent has a living rank
before it, unless all are, and 256 ranks on one file system ask for 256 files at a time, not for 65,536.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.ranks.log import RankLog

BEAT_S = 10.0
"""So often a rank writes where it is; a new stage is written at once."""
PER_LIMIT = 4
"""At least so often within the time after which it counts as silent."""
OVER = ("ended", "failed")
"""The last stages of a rank that has said its last word."""
SHOWN = 4


class Beats:
    """This rank's file, and what it knows of the others'."""

    def __init__(self, log: RankLog, *, limit: float) -> None:
        self.every = min(BEAT_S, limit / PER_LIMIT) if limit else BEAT_S
        self._rank, self._path, self._limit = log.rank, log.path.with_suffix(".json"), limit
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self._next = self._of((log.rank + 1) % world) if world > 1 else None
        self._seen, self._heard, self._told = self._mark(), float("inf"), 0.0  # what an earlier start left is no word
        self._can_tell = True

    def _of(self, rank: int) -> Path:
        return self._path.with_name(f"rank-{rank:04d}.json")

    def _mark(self) -> int:
        try:
            return self._next.stat().st_mtime_ns if self._next else 0
        except OSError:
            return 0

    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._told >= self.every

    def hurry(self) -> None:
        """What the rank does has changed: it is due now."""
        self._told = 0.0

    def tell(self, here: Mapping[str, Any]) -> None:
        """Write where this rank is. On a full disk the file's time is set: that it lives needs no room."""
        self._told = time.monotonic()
        beat = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **here}
        beside = self._path.with_suffix(".json.new")
        try:
            beside.write_text(json.dumps(beat))
            beside.replace(self._path)
            self._can_tell = True
        except FileNotFoundError:  # a dry run, or a user, has removed the folder
            self._can_tell = False
        except OSError:
            self._can_tell = False
            with suppress(OSError):
                os.utime(self._path)

    def excuse(self, seconds: float) -> None:
        """This process stood still itself, as a suspended job does: it could hear nobody."""
        self._heard += seconds

    def silent(self) -> str:
        """Say which rank has not been heard for the limit, if the next one has not; empty where nobody is known to be.

        A rank that has yet to be heard in this start is waited for by others than this. Who cannot write here does not
        judge others by what they write.
        """
        now, mark = time.monotonic(), self._mark()
        if mark != self._seen:
            self._seen, self._heard = mark, now if mark else float("inf")
        if not self._limit or not self._next or not self._can_tell or now - self._heard <= self._limit:
            return ""
        beat = read_beat(self._next)
        return "" if beat is None or beat["stage"] in OVER else _words(beat)

    def others(self) -> list[str]:
        """The ranks that are behind this one or silent for longest, in words."""
        beats = [read_beat(path) for path in sorted(self._path.parent.glob("rank-*.json"))]
        found = [beat for beat in beats if beat and beat["rank"] != self._rank]
        found.sort(key=lambda beat: (beat["step"] if beat["step"] is not None else -1, beat["time"]))
        return [_words(beat) for beat in found[:SHOWN]]

    def busy(self) -> bool:
        """Whether any other rank lives and says that it is busy."""
        beats = [read_beat(path) for path in sorted(self._path.parent.glob("rank-*.json"))]
        return any(
            beat.get("busy") and time.time() - beat["time"] < max(self._limit, 2 * self.every)
            for beat in beats
            if beat and beat["rank"] != self._rank
        )

    def gone_beside(self) -> list[int]:
        """Ranks of this machine and start that ended without saying so."""
        local, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = self._rank - local
        beats = [read_beat(self._of(rank)) for rank in range(first, first + size)]
        return [
            beat["rank"]
            for beat in beats
            if beat and beat["host"] == socket.gethostname() and beat["stage"] != "ended" and not _alive(beat["pid"])
        ]


def read_beat(path: Path) -> dict[str, Any] | None:
    """What a rank last said; None where there is nothing whole."""
    try:
        beat: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return beat


def _words(beat: Mapping[str, Any]) -> str:
    ago = time.time() - beat["time"]
    return f"rank {beat['rank']}, {beat['host']}: step {beat['step']}, {beat['stage']}, {ago:.0f} s ago"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

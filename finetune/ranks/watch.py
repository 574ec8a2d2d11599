"""A thread in each rank: it writes heartbeats, receives signals at once, and ends the rank if it stalls.

The main thread may be inside a collective that never returns; then it runs no Python, but this thread still does.
Outside of steps, nobody knows how long a rank may take, so a rank ends only if the rank after it has fallen silent. The
first meeting of all ranks does have the limit of a step, because networks fail there. A signal that asks the rank to
stop also interrupts a wait for data. If another rank of this machine or the launcher has died, this rank ends at once.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.format.printable import count_of
from finetune.ranks.failures import Kind, first_failure, keep_failure, meeting, tell
from finetune.ranks.flight import forget_flight, record_flight, write_flight
from finetune.ranks.heartbeats import Heartbeats
from finetune.ranks.log import RankLog
from finetune.ranks.save_limit import SaveLimit
from finetune.ranks.signals import Wishes
from finetune.ranks.stall_text import stall_text

SAVING = "the checkpoint"
LOOK_S = 0.5
"""Seconds between two checks of the thread."""
RECORD_S = 10.0
"""Seconds that an ending rank may take to write its last collectives."""
SUSPENDED_S = 5.0
"""Seconds without a check after which the entire process must have been suspended, rather than stuck."""


class Watch:
    """The watch of one rank.

    The rank ends after waiting `data_stall` seconds for a pack, or `step_stall` seconds for other ranks where none
    works alone: at the start and the end of the run, in a step, in a save. `release` gives up what the rank holds, if a
    signal ends it at once.
    """

    def __init__(
        self, log: RankLog, *, data_stall: float, step_stall: float, release: Callable[[], None] = lambda: None
    ) -> None:
        self.reading: Callable[[], Sequence[str]] = list
        """Names the samples that are being read now."""
        self.broken_off: Exception | None = None
        """The exception that ended a wait for data. While it is kept, no reader is joined, which could take forever."""
        self._log, self._wishes = log, Wishes(log, release)
        self._heartbeats = Heartbeats(log, limit=step_stall)
        self._limits = {"data": data_stall, "step": step_stall, "together": step_stall}  # a save has a limit of its own
        self._save = SaveLimit(step_stall, another_works=self._heartbeats.another_works)
        self._stack_path = log.path.with_suffix(".stack")
        self._launcher = os.getppid()
        self._here: dict[str, Any] = {"step": None, "stage": "start", "samples": [], "collective": None}
        self._kind, self._since = "", time.monotonic()
        self._is_over = threading.Event()

    @property
    def stop(self) -> int:
        """The signal that asks this rank to stop; 0 for none."""
        return self._wishes.stop

    # --- called by the rank, to say where it is

    def stage(self, name: str, *, quiet: bool = False) -> None:
        """Enter a stage of the run outside of its steps; it has no time limit."""
        self._enter("", step=None, stage=name, samples=[], collective=None)
        if not quiet:
            self._log.note(f"--- {name}")
            self._write_heartbeat()

    def together(self, stage: str) -> None:
        """Note that the rank now only waits for all others: at the start of the run, or at its end."""
        self._enter("together", step=None, stage=stage, samples=[], collective="the meeting of all ranks")
        self._write_heartbeat()

    def save(self, step: int, folder: Path) -> None:
        """Note that the rank now writes a checkpoint into `folder`, together with all others."""
        self._save.begin(folder)
        self._log.note(f"--- checkpoint after {count_of(step, 'step')}")
        self._enter("save", step=step, stage=SAVING, samples=[], collective=SAVING)

    def busy(self, is_busy: bool) -> None:
        """Note, within a save, that the rank now works on a file, or waits for others that do."""
        self._save.work(is_busy)
        if self._kind == "save":
            self._heartbeats.write_soon()

    def data(self, step: int) -> None:
        """Note that the rank now waits for the data of a step."""
        self._enter("data", step=step, stage="waiting for data", samples=[], collective=None)

    def work(self, step: int, what: str, samples: Sequence[str] = ()) -> None:
        """Note that the rank now computes, together with all others: any collective may wait for another rank."""
        self._wishes.has_begun = True
        self._enter("step", step=step, stage=what, samples=list(samples), collective=what)

    def _enter(self, kind: str, **here: Any) -> None:
        self._here = here
        self._kind, self._since = kind, time.monotonic()

    # --- from start to end

    @contextmanager
    def on(self) -> Iterator["Watch"]:
        """Watch while the block runs; call this in the main thread, before the first process group is made."""
        forget_flight(self._log.folder, self._log.rank)
        record_flight(self._log.folder)
        thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        with self._wishes.caught(), self._stack_path.open("w") as stacks:
            faulthandler.register(signal.SIGUSR2, file=stacks)  # where every thread stands, on demand
            thread.start()
            try:
                yield self
                self._here["stage"] = "ended"
            except BaseException:
                self._here["stage"] = "failed"
                raise
            finally:
                self._is_over.set()
                self._wishes.wake()
                thread.join()
                faulthandler.unregister(signal.SIGUSR2)
                self._write_heartbeat()

    # --- the thread

    def _watch(self) -> None:
        self._write_heartbeat()
        looked = time.monotonic()
        while not self._is_over.is_set():
            self._wishes.hear(LOOK_S)
            looked, before = time.monotonic(), looked
            if looked - before > SUSPENDED_S:
                self._add_pause(looked - before)
            self._look_around()
            if limit := self._passed_limit():
                self._end_stalled(limit)

    def _add_pause(self, seconds: float) -> None:
        self._since += seconds
        self._save.add_pause(seconds)
        self._heartbeats.add_silence(seconds)

    def _look_around(self) -> None:
        """End this rank if its launcher or another rank is gone, and write its heartbeat when it is due."""
        if os.getppid() != self._launcher and not self.stop:
            self._end("lost", "the launcher that started this rank is gone")
        if self.stop and (dead := self._heartbeats.dead_neighbours()):
            self._end("lost", f"rank {dead[0]} of this machine is gone")
        if not self._heartbeats.is_due():
            return
        self._write_heartbeat()
        if self.stop and (first := first_failure(self._log.folder, start=meeting(os.environ))):
            self._end("lost", f"rank {first.rank} has failed")
        if self._kind in ("", "save") and (silent := self._heartbeats.silent_rank()):
            self._end(
                "stall",
                f"a silent rank. Last heartbeat: {silent}. It was killed or suspended, or its machine is cut off. "
                f"This rank waits in {self._here['stage']}. run.stall_seconds is the limit",
            )

    def _passed_limit(self) -> float:
        """Return the limit that this rank has passed, in seconds; 0 while it may go on."""
        if self._kind == "save":
            return self._save.passed()
        limit = self._limits.get(self._kind, 0.0)
        return limit if time.monotonic() - self._since > limit else 0.0

    def _end_stalled(self, limit: float) -> None:
        text = stall_text(
            self._kind,
            self._here,
            limit,
            reading=self.reading(),
            others=self._heartbeats.slowest(),
            is_busy=self._save.is_working,
        )
        self._end("stall", text)

    def _write_heartbeat(self) -> None:
        here = self._here | {"busy": self._save.is_working}
        if self._kind == "data":
            here["samples"] = list(self.reading())
        self._heartbeats.write(here)

    def _end(self, kind: Kind, message: str) -> None:
        """End this rank from the thread; the main thread may never run again."""
        self._write_heartbeat()
        with suppress(OSError), self._stack_path.open("a") as file:
            faulthandler.dump_traceback(file)
        failure = keep_failure(self._log, kind, message)
        if kind == "stall":
            tell(self._log, failure, message)
        recording = threading.Thread(target=write_flight, args=(self._log.folder, self._log.rank), daemon=True)
        recording.start()  # it may block on data that the stuck collective holds
        recording.join(RECORD_S)
        os._exit(failure.code)

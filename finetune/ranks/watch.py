"""A thread beside each rank: it says where the rank is, hears signals at once, and ends a rank that stands still.

The rank itself may be inside a collective that never returns; then no Python of its own runs, but this thread does.
Outside of steps, where nobody knows how long a rank may take, a rank ends when the rank after it has fallen silent;
only the first meeting of all ranks has the limit of a step, as networks fail there. A wait for data is broken off when
a signal asks for an end. A rank of this machine that has died, and a lost launcher, end this rank now.
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
"""Seconds between two looks of the thread."""
RECORD_S = 10.0
"""Seconds that a rank which ends may take to write its last collectives."""
SUSPENDED_S = 5.0
"""If this thread itself did not run for this long, the whole process was suspended rather than stuck."""


class Watch:
    """One rank's watch. `stop` is the signal that asks for an end, 0 for none.

    `data_stall` is after how many seconds of waiting for a pack the rank ends, `step_stall` of waiting for other ranks
    where nobody works alone: at the start of the run and its end, in a step, in a save. `release` gives back what the
    rank holds, where a signal ends it at once.
    """

    def __init__(
        self, log: RankLog, *, data_stall: float, step_stall: float, release: Callable[[], None] = lambda: None
    ) -> None:
        self.reading: Callable[[], Sequence[str]] = list
        """Names the samples that are being read now."""
        self.broken_off: Exception | None = None
        """Where the wait for data was left: while it is known, no reader is torn down, which waits for it to end."""
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
        """The signal that asks this rank for an end; 0 for none."""
        return self._wishes.stop

    # --- what the rank says of itself

    def stage(self, name: str, *, quiet: bool = False) -> None:
        """Enter a stage of the run outside of its steps; it may take as long as it takes."""
        self._enter("", step=None, stage=name, samples=[], collective=None)
        if not quiet:
            self._log.note(f"--- {name}")
            self._write_heartbeat()

    def together(self, stage: str) -> None:
        """From here the rank only waits for all others to be there: at the start of the run, or at its end."""
        self._enter("together", step=None, stage=stage, samples=[], collective="the meeting of all ranks")
        self._write_heartbeat()

    def save(self, step: int, folder: Path) -> None:
        """From here the rank writes a checkpoint into `folder`, together with all others."""
        self._save.begin(folder)
        self._log.note(f"--- checkpoint after {count_of(step, 'step')}")
        self._enter("save", step=step, stage=SAVING, samples=[], collective=SAVING)

    def busy(self, is_busy: bool) -> None:
        """Within a save: from here the rank works on a file, or waits for others that do."""
        self._save.work(is_busy)
        if self._kind == "save":
            self._heartbeats.write_soon()

    def data(self, step: int) -> None:
        """From here the rank waits for the data of a step."""
        self._enter("data", step=step, stage="waiting for data", samples=[], collective=None)

    def work(self, step: int, what: str, samples: Sequence[str] = ()) -> None:
        """From here the rank computes, in step with all others: any collective may wait for another rank."""
        self._wishes.has_begun = True
        self._enter("step", step=step, stage=what, samples=list(samples), collective=what)

    def _enter(self, kind: str, **here: Any) -> None:
        self._here = here
        self._kind, self._since = kind, time.monotonic()

    # --- from start to end

    @contextmanager
    def on(self) -> Iterator["Watch"]:
        """Watch while the block runs; in the main thread, and before the first process group is made."""
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
            self._end("lost", f"rank {dead[0]} beside this one is gone")
        if not self._heartbeats.is_due():
            return
        self._write_heartbeat()
        if self.stop and (first := first_failure(self._log.folder, start=meeting(os.environ))):
            self._end("lost", f"rank {first.rank} has failed")
        if self._kind in ("", "save") and (silent := self._heartbeats.silent_rank()):
            self._end(
                "stall",
                f"a silent rank: nothing was heard of {silent}. It was killed or suspended, or its machine is cut off; "
                f"this rank waits in {self._here['stage']}. run.stall_seconds is the limit",
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
        recording.start()  # what it reads may be held by the collective that never returns
        recording.join(RECORD_S)
        os._exit(failure.code)

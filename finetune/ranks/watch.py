"""A thread beside each rank: it hears signals at once, says where the rank is, and ends a rank that stands still.

The rank itself may be inside a collective that never returns; then no Python of its own runs, but this thread does.
Outside of steps, where nobody knows how long a rank may take, it ends when the rank after it is not heard any more;
only the first exchange of all has the limit of a step, as networks fail there.
Signals that ask for an end (SIGTERM, SIGUSR1, SIGHUP) only raise a wish, which the ranks agree on when a step ends,
or before one begins; until the first step there is nothing to lose, and they end the rank. Waiting for data is broken
off.
Ctrl-C, a rank beside this one that has died, and a lost launcher end the rank now.
"""

import ctypes
import faulthandler
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.ranks.failures import Failure, Kind, first_failure, keep_failure, keep_outcome
from finetune.ranks.flight import forget_flight, write_flight
from finetune.ranks.heartbeats import Beats
from finetune.ranks.log import RankLog
from finetune.ranks.stall_text import stall_text

WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAVE = 8
"""A rank may write its part of a save so many times as long as a step may take, with not a byte more on the disk: what
the disk has taken it may still be writing. Ranks that only wait for each other are given the time of a step."""
SAVING = "the checkpoint"
WITH_OTHERS = ("step", "save", "together")
"""What a rank may be in that takes all of them, and so has a limit."""
LOOK_S, RECORD_S = 0.5, 10.0
SUSPENDED_S = 5.0
"""When this thread did not run for so long, nothing of the process did: it was suspended, and did not stand still."""
PREEMPTED = 75
"""The exit code of a run that shall be started again."""
_PR_SET_PDEATHSIG = 1
_children = False  # whether forked children are already cared for


class Watch:
    """One rank's watch. `stop` is the signal that asks for an end, 0 for none.

    `data_stall` is after how many seconds of waiting for a pack it ends, `step_stall` of waiting for other ranks where
    nobody works alone: at the start of the run and its end, in a step, in a save.
    """

    def __init__(self, log: RankLog, *, data_stall: float, step_stall: float) -> None:
        self.stop = 0
        self.reading: Callable[[], Sequence[str]] = list
        self._log, self._limits = log, {"data": data_stall, **dict.fromkeys(WITH_OTHERS, step_stall)}
        self._beats = Beats(log, limit=step_stall)
        self._stack_path = log.path.with_suffix(".stack")
        self._parent, self._began = os.getppid(), time.time()
        self._here: dict[str, Any] = {"step": None, "stage": "start", "samples": [], "collective": None}
        self._busy = self._idle_seen = False
        self._kind, self._since = "", time.monotonic()
        self._begun = False
        self.broken_off: Exception | None = None
        """Where the wait for data was left: while it is known, no reader is torn down, which waits for it to end."""
        self._growing: Path | None = None
        self._grown: tuple[float, object] = 0.0, None
        self._over = threading.Event()
        self._ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)

    # --- what the rank tells

    def stage(self, name: str, *, quiet: bool = False) -> None:
        """Enter a stage of the run outside of its steps; it may take as long as it takes."""
        self._enter("", step=None, stage=name, samples=[], collective=None)
        if not quiet:
            self._log.note(f"--- {name}")
            self._beat()

    def together(self, stage: str) -> None:
        """From here the rank only waits for all others to be there: at the start of the run, or at its end."""
        self._enter("together", step=None, stage=stage, samples=[], collective="the meeting of all ranks")
        self._beat()

    def save(self, step: int, folder: Path) -> None:
        """From here the rank writes a checkpoint into `folder`, together with all others."""
        self._growing, self._grown = folder, (time.monotonic(), None)
        self._idle_seen = False
        self._log.note(f"--- checkpoint after {step} steps")
        self._enter("save", step=step, stage=SAVING, samples=[], collective=SAVING)

    def busy(self, is_busy: bool) -> None:
        """Within a save: from here the rank works on a file, or waits for others that do."""
        self._busy = is_busy
        if self._kind == "save":
            self._since, self._idle_seen = time.monotonic(), False
            self._beats.hurry()

    def data(self, step: int) -> None:
        """From here the rank waits for the data of a step."""
        self._enter("data", step=step, stage="waiting for data", samples=[], collective=None)

    def work(self, step: int, what: str, samples: Sequence[str] = ()) -> None:
        """From here the rank computes, in step with all others: any collective may wait for another rank."""
        self._begun = True
        self._enter("step", step=step, stage=what, samples=list(samples), collective=what)

    def _enter(self, kind: str, **here: Any) -> None:
        self._here, self._kind, self._since = here, kind, time.monotonic()

    # --- from start to end

    @contextmanager
    def on(self) -> Iterator["Watch"]:
        """Watch while the block runs; in the main thread."""
        _care_for_children()
        forget_flight(self._log.folder, self._log.rank)
        before: dict[signal.Signals, Any] = {n: signal.signal(n, _heard) for n in (*WISHES, signal.SIGINT)}
        stacks = self._stack_path.open("w")
        faulthandler.register(signal.SIGUSR2, file=stacks)  # where every thread stands, on demand
        fd = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        thread.start()
        try:
            yield self
            self._here["stage"] = "ended"
        except BaseException:
            self._here["stage"] = "failed"
            before = dict.fromkeys(WISHES, signal.SIG_IGN)  # until it is written down why, and then it ends
            raise
        finally:
            self._over.set()
            signal.set_wakeup_fd(fd)
            os.write(self._mouth, b"\0")
            thread.join()
            faulthandler.unregister(signal.SIGUSR2)
            for number, handler in before.items():
                signal.signal(number, handler)
            stacks.close()
            os.close(self._ears)
            os.close(self._mouth)
            self._beat()

    # --- the thread

    def _watch(self) -> None:
        self._beat()
        looked = time.monotonic()
        while not self._over.is_set():
            ready, _, _ = select.select([self._ears], [], [], LOOK_S)
            for number in os.read(self._ears, 64) if ready else b"":
                self._hear(number)
            looked, before = time.monotonic(), looked
            if looked - before > SUSPENDED_S:
                self._since += looked - before
                self._beats.excuse(looked - before)
            self._look_around()
            limit = self._limits.get(self._kind, 0.0)
            if self._kind == "save" and self._busy:
                self._see_growth(limit)
                limit *= SAVE
            if limit and time.monotonic() - self._since > limit and not self._is_writing_elsewhere(limit):
                self._stalled(limit)

    def _look_around(self) -> None:
        if os.getppid() != self._parent and not self.stop:
            self._end("lost", "the launcher that started this rank is gone")
        if self.stop and (gone := self._beats.gone_beside()):
            self._end("lost", f"rank {gone[0]} beside this one is gone")
        if not self._beats.due():
            return
        self._beat()
        if self.stop and (first := self._failed()):
            self._end("lost", f"rank {first.rank} has failed")
        if self._kind in ("", "save") and (silent := self._beats.silent()):
            self._end(
                "stall",
                f"a silent rank: nothing was heard of {silent}. It was killed or suspended, or its machine is cut off; "
                f"this rank waits in {self._here['stage']}. run.stall_seconds is the limit",
            )

    def _is_writing_elsewhere(self, limit: float) -> bool:
        """In a save: whether to wait on, as another rank is busy, or may be so since it last said it was not."""
        if self._kind != "save" or self._busy:
            return False
        seen, self._idle_seen = self._idle_seen, not self._beats.busy()
        self._since = time.monotonic() - (limit / 2 if self._idle_seen else 0.0)
        return not (seen and self._idle_seen)

    def _failed(self) -> Failure | None:
        return first_failure(self._log.folder, since=self._began)

    def _see_growth(self, every: float) -> None:
        """Count from the last time that a save's folder changed, and look at it as seldom as the limit allows."""
        looked, seen = self._grown
        if self._growing is None or not every or time.monotonic() - looked < every:
            return
        found = _content(self._growing)
        if found != seen:
            self._since = time.monotonic()
        self._grown = time.monotonic(), found

    def _hear(self, number: int) -> None:
        if number == signal.SIGINT:
            self._log.note("Ctrl-C: ends now")
            os._exit(128 + number)
        if number in WISHES:
            self.stop = self.stop or number
            self._log.note(f"{signal.Signals(number).name}: stops when this step is done")
            if not self._begun:
                self._log.note("no step was begun since the start: ends now")
                if number != signal.SIGTERM:  # launchers send that one too, when another rank has failed
                    keep_outcome(self._log, "preempted", None)
                os._exit(exit_code(number))

    def _stalled(self, limit: float) -> None:
        text = stall_text(
            self._kind, self._here, limit, reading=self.reading(), others=self._beats.others(), is_busy=self._busy
        )
        self._end("stall", text)

    def _beat(self) -> None:
        here = self._here | {"busy": self._busy}
        if self._kind == "data":
            here["samples"] = list(self.reading())
        self._beats.tell(here)

    def _end(self, kind: Kind, message: str) -> None:
        """End this rank from the thread; the main thread may never run again."""
        self._beat()
        with self._stack_path.open("a") as file:
            faulthandler.dump_traceback(file)
        failure = keep_failure(self._log, kind, message)
        if kind == "stall":
            self._log.shout(f"moetune train, rank {self._log.rank}: {message}")
        recording = threading.Thread(target=write_flight, args=(self._log.folder, self._log.rank), daemon=True)
        recording.start()  # what it reads may be held by the collective that never returns
        recording.join(RECORD_S)
        os._exit(failure.code)


def exit_code(stop: int) -> int:
    """Return how a rank that was stopped by a signal, or by none, ends.

    torchrun passes SIGTERM on and ends with an error itself; a rank that does so too would only look like the cause.
    Any other signal, or launcher, needs the rank's own word that the run is not done.
    """
    if not stop or (stop == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ):
        return 0
    return PREEMPTED


def _heard(number: int, frame: FrameType | None) -> None:
    """The thread is told through the wake-up pipe, also while the main thread is inside a library."""


def _care_for_children() -> None:
    """Let forked children (the data's workers) leave signals to their parent, and never outlive it.

    torchrun signals a rank's whole group, and torch's workers die of SIGTERM whatever they were told to ignore: they
    get a group of their own.
    """
    global _children  # noqa: PLW0603  # the hook is the process's, and cannot be taken back
    if not _children:
        os.register_at_fork(after_in_child=_in_child)
        _children = True


def _in_child() -> None:
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in (*WISHES, signal.SIGINT):
        if signal.getsignal(number) is _heard:
            signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _content(folder: Path) -> object:
    """What is in a run's checkpoints: it changes with every file that grows, gets a name, or goes."""
    found = []
    with suppress(OSError):  # it is being renamed or removed: another look sees the rest
        for path in sorted(folder.glob("*/*")):
            found.append((path.parent.name, path.name, path.stat().st_size))
    return found

"""A thread beside each rank: it hears signals at once, says where the rank is, and ends a rank that stands still.

The rank itself may be inside a collective that never returns; then no Python of its own runs, but this thread does.
Signals that ask for an end (SIGTERM, SIGUSR1, SIGHUP) only raise a wish, which the ranks agree on when a step ends.
Ctrl-C, a rank beside this one that has died, and a lost launcher end the rank now.
"""

import ctypes
import faulthandler
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.failures import Kind, keep_failure
from finetune.rank_log import RankLog

WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
BEAT_S = 10.0
"""So often a rank writes where it is; a new stage is written at once."""
SHOWN = 4
SAVE = 8
"""A save may take so many times what a step may: a disk is slower than any rank, but not without end."""
PREEMPTED = 75
"""The exit code of a run that shall be started again."""
_PR_SET_PDEATHSIG = 1
_children = False  # whether forked children are already cared for


class Watch:
    """One rank's watch. `stop` is the signal that asks for an end, 0 for none.

    `stalls` says what stands still after how many seconds: "data", waiting for a pack; "step", anything else in a step.
    """

    def __init__(self, log: RankLog, *, data_stall: float, step_stall: float) -> None:
        self.stop = 0
        self.reading: Callable[[], Sequence[str]] = list
        self._log, self._limits = log, {"data": data_stall, "step": step_stall, "save": SAVE * step_stall}
        self._beat_path = log.path.with_suffix(".json")
        self._stack_path = log.path.with_suffix(".stack")
        self._parent, self._beaten = os.getppid(), 0.0
        self._here: dict[str, Any] = {"step": None, "stage": "start", "samples": [], "collective": None}
        self._kind, self._since = "", time.monotonic()
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

    def save(self, step: int) -> None:
        """From here the rank writes a checkpoint together with all others."""
        self._log.note(f"--- checkpoint after {step} steps")
        self._enter("save", step=step, stage="the checkpoint", samples=[], collective="the checkpoint")

    def data(self, step: int) -> None:
        """From here the rank waits for the data of a step."""
        self._enter("data", step=step, stage="waiting for data", samples=[], collective=None)

    def work(self, step: int, what: str, samples: Sequence[str] = ()) -> None:
        """From here the rank computes, in step with all others: any collective may wait for another rank."""
        self._enter("step", step=step, stage=what, samples=list(samples), collective=what)

    def _enter(self, kind: str, **here: Any) -> None:
        self._here, self._kind, self._since = here, kind, time.monotonic()

    # --- from start to end

    @contextmanager
    def on(self) -> Iterator["Watch"]:
        """Watch while the block runs; in the main thread."""
        _care_for_children()
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
        while not self._over.is_set():
            ready, _, _ = select.select([self._ears], [], [], 0.5)
            for number in os.read(self._ears, 64) if ready else b"":
                self._hear(number)
            if os.getppid() != self._parent and not self.stop:
                self._end("lost", "the launcher that started this rank is gone")
            if self.stop and (gone := self._gone_beside()):
                self._end("lost", f"rank {gone[0]} beside this one is gone")
            if time.monotonic() - self._beaten >= BEAT_S:
                self._beat()
            limit = self._limits.get(self._kind, 0.0)
            if limit and time.monotonic() - self._since > limit:
                self._stalled(limit)

    def _hear(self, number: int) -> None:
        if number == signal.SIGINT:
            self._log.note("Ctrl-C: ends now")
            os._exit(128 + number)
        if number in WISHES:
            self.stop = self.stop or number
            self._log.note(f"{signal.Signals(number).name}: stops when this step is done")

    def _stalled(self, limit: float) -> None:
        here = self._here
        if self._kind == "data":
            reading = "; ".join(self.reading()) or "nothing of this process"
            self._end(
                "stall",
                f"data stall: step {here['step']} has waited {limit:g} s for data. Being read: {reading}. Look at "
                f"these samples with `moetune shards check`; data.stall_seconds is the limit",
            )
        samples = ", ".join(here["samples"][:SHOWN]) + (", ..." if len(here["samples"]) > SHOWN else "")
        others = "; ".join(self._others()) or "none has written"
        self._end(
            "stall",
            f"collective stall: step {here['step']} has stood for {limit:g} s in {here['stage']}"
            + (f" of samples {samples}" if samples else "")
            + f". This rank has its data; some other rank does not come. They last said: {others}. "
            f"run.stall_seconds is the limit",
        )

    def _others(self) -> list[str]:
        """The ranks that are behind this one or silent for longest, in words."""
        found = []
        for path in sorted(self._beat_path.parent.glob("rank-*.json")):
            beat = _read(path)
            if beat and beat["rank"] != self._log.rank:
                found.append((beat["step"] if beat["step"] is not None else -1, beat["time"], beat))
        found.sort(key=lambda item: item[:2])
        return [
            f"rank {beat['rank']}, {beat['host']}: step {beat['step']}, {beat['stage']}, {time.time() - said:.0f} s ago"
            for _, said, beat in found[:SHOWN]
        ]

    def _gone_beside(self) -> list[int]:
        """Ranks of this machine and start that ended without saying so."""
        local, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = self._log.rank - local
        beats = [_read(self._beat_path.with_name(f"rank-{rank:04d}.json")) for rank in range(first, first + size)]
        return [
            beat["rank"]
            for beat in beats
            if beat and beat["host"] == socket.gethostname() and beat["stage"] != "ended" and not _alive(beat["pid"])
        ]

    def _beat(self) -> None:
        self._beaten = time.monotonic()
        beat = {
            "rank": self._log.rank, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **self._here,
        }  # fmt: skip
        beside = self._beat_path.with_suffix(".json.new")
        with suppress(FileNotFoundError):  # a dry run, or a user, has removed the folder
            beside.write_text(json.dumps(beat))
            beside.replace(self._beat_path)

    def _end(self, kind: Kind, message: str) -> None:
        """End this rank from the thread; the main thread may never run again."""
        self._beat()
        with self._stack_path.open("a") as file:
            faulthandler.dump_traceback(file)
        failure = keep_failure(self._log, kind, message)
        if kind == "stall":
            self._log.shout(f"moetune train, rank {self._log.rank}: {message}")
        os._exit(failure.code)


def exit_code(stop: int) -> int:
    """Return how a rank that was stopped by a signal, or by none, ends.

    torchrun passes SIGTERM on and ends with an error itself; a rank that does so too would only look like the cause.
    Any other signal, or launcher, needs the rank's own word that the run is not done.
    """
    if not stop or (stop == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ):
        return 0
    return PREEMPTED


def record_flight(folder: Path) -> None:
    """Let the flight recorder of collectives write beside the logs, should the backend's own watchdog fire."""
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, str((folder / "flight-").absolute()))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def _heard(number: int, frame: FrameType | None) -> None:
    """The thread is told through the wake-up pipe, also while the main thread is inside a library."""


def _care_for_children() -> None:
    """Let forked children (the data's workers) leave signals to their parent, and never outlive it."""
    global _children  # noqa: PLW0603  # the hook is the process's, and cannot be taken back
    if not _children:
        os.register_at_fork(after_in_child=_in_child)
        _children = True


def _in_child() -> None:
    signal.set_wakeup_fd(-1)
    for number in (*WISHES, signal.SIGINT):
        if signal.getsignal(number) is _heard:
            signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        beat: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return beat


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

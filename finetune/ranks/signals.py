"""Signals of a rank: which of them ask it to stop, how another thread receives them, and how a stopped rank exits.

SIGTERM, SIGUSR1 and SIGHUP ask the rank to stop; the ranks agree on it at the end of the step, or before one begins.
Before the first step there is nothing to lose, so they end the rank at once, as Ctrl-C always does. Loads no torch,
because the launcher reads the exit code.
"""

import ctypes
import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from finetune.ranks.failures import keep_failure, keep_outcome
from finetune.ranks.log import RankLog

WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a rank to stop."""
PREEMPTED = 75
"""The exit code of a run that should be started again."""
GUARDED = 76
"""The exit code of a run that a guard of its evaluation stopped: starting it again changes nothing."""
_PR_SET_PDEATHSIG = 1
_cares_for_children = False


class Wishes:
    """The signals that ask this rank to stop: caught in the main thread, received in another one.

    The main thread may be inside a collective that never returns. Then no Python handler runs, but the signal is still
    written to the wake-up pipe.
    """

    def __init__(self, log: RankLog, release: Callable[[], None]) -> None:
        self.stop = 0
        """The first signal that asked this rank to stop; 0 for none."""
        self.has_begun = False
        """True when a step has begun in this start: before that there is nothing to save."""
        self._log, self._release = log, release
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch signals while the block runs; call this in the main thread.

        After a block that fails, requests to stop are ignored: the rank ends once the reason is recorded.
        """
        _care_for_children()
        handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, _wake_thread) for number in (*WISHES, signal.SIGINT)
        }
        wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        try:
            yield
        except BaseException:
            handlers = dict.fromkeys(WISHES, signal.SIG_IGN)
            raise
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(self._read_end)
            os.close(self._write_end)

    def wake(self) -> None:
        """Make a waiting call of `hear` return now."""
        os.write(self._write_end, b"\0")

    def hear(self, seconds: float) -> None:
        """Wait up to this many seconds for signals, and obey them."""
        ready, _, _ = select.select([self._read_end], [], [], seconds)
        for number in os.read(self._read_end, 64) if ready else b"":
            self._obey(number)

    def _obey(self, number: int) -> None:
        if number == signal.SIGINT:
            self._log.note("Ctrl-C: the rank ends now")
            failure = keep_failure(self._log, "interrupted", "interrupted (SIGINT)")
            self._release()
            os._exit(failure.code)
        if number in WISHES:
            self.stop = self.stop or number
            self._log.note(f"{signal.Signals(number).name}: the rank stops at the end of this step")
            if not self.has_begun:
                self._log.note("no step has begun since the start: the rank ends now")
                if number != signal.SIGTERM:  # launchers also send SIGTERM when another rank has failed
                    keep_outcome(self._log, "preempted", None)
                self._release()
                os._exit(exit_code(number))


def exit_code(stop: int) -> int:
    """Return the exit code of a rank that was stopped by this signal; 0 stands for none.

    torchrun passes SIGTERM on and ends with an error itself; a rank that did so too would look like the cause. With any
    other signal or launcher, only the exit code of the rank says that the run is not done.
    """
    if not stop or (stop == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ):
        return 0
    return PREEMPTED


def _wake_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread receives the signal through the pipe."""


def _care_for_children() -> None:
    """Make forked children (the data's workers) leave signals to their parent, and never outlive it.

    torchrun signals the entire process group of a rank, and torch's workers die of SIGTERM even if they were set to
    ignore it. So they get a group of their own.
    """
    global _cares_for_children  # noqa: PLW0603  # the hook is for the entire process, and cannot be removed
    if not _cares_for_children:
        os.register_at_fork(after_in_child=_leave_signals_to_parent)
        _cares_for_children = True


def _leave_signals_to_parent() -> None:
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in (*WISHES, signal.SIGINT):
        if signal.getsignal(number) is _wake_thread:
            signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

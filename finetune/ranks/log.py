"""One rank's log, logs/rank-0007.log in the run's folder: its messages, its stages and the output of its streams.

Only rank 0 writes to the terminal: the standard streams of all others go into their logs.
"""

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from data.format.printable import printable

LAUNCHER_LOGS = "MOETUNE_LAUNCHER_LOGS"
"""The environment variable with the folder in which `moetune train` looks for the reasons why its ranks ended.

The command itself shows these to the user.
"""


_WARNINGS = logging.getLogger("py.warnings")
"""The logger that receives Python's warnings once logging captures them."""


def listed(items: Sequence[object], most: int = 8, between: str = ", ") -> str:
    """Join the first few items, and count the rest: `a, b and 3 more`."""
    shown, rest = between.join(map(str, items[:most])), len(items) - most
    if rest <= 0:
        return shown
    return f"{shown}{' ' if between == ', ' else f'{between}... '}and {rest} more"


def ranks_named(ranks: Sequence[int]) -> str:
    """Return the numbers of ranks as text: `rank 3`, or `ranks 3, 4`."""
    return f"rank{'s' if len(ranks) != 1 else ''} {listed(ranks)}"


def print_line(text: str) -> None:
    """Print a line and flush it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class RankLog:
    """Call it with a message: it goes into the log, and from rank 0 to the terminal as well.

    Keys and texts of data may hold escape sequences. They are shown as text, also in the log, because people `cat` it.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank, self.folder = rank, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:04d}.log"
        self.show: Callable[[str], None] = print_line
        self.terminal = sys.stderr
        self._can_write = True
        self._streams: list[int] = []
        self._noted = _Noted(self)
        self._lock = threading.Lock()  # the watch and W&B write from their own threads
        self._file = self.path.open("a", buffering=1)

    def __call__(self, text: str) -> None:
        """Write a message into the log, and from rank 0 to the terminal."""
        self.note(text)
        if self.rank == 0:
            self.show(printable(text))

    def note(self, text: str) -> None:
        """Write into the log only. If the log cannot be written (full disk), warn once; the run goes on."""
        with self._lock:
            try:
                self._file.write(f"{datetime.now().isoformat(timespec='milliseconds')} {printable(text)}\n")
            except OSError as error:
                if self._can_write:
                    self._print(f"warning: {self.path} cannot be written: {error}")
                self._can_write = False

    def shout(self, text: str) -> None:
        """Write into the log and to the terminal, from any rank."""
        self.note(text)
        self._print(text)

    def _print(self, text: str) -> None:
        self.terminal.write(printable(text) + "\n")
        self.terminal.flush()

    def close(self) -> None:
        """Restore the streams; nothing is logged after this."""
        if self._noted in _WARNINGS.handlers:
            _WARNINGS.removeHandler(self._noted)
            logging.captureWarnings(False)
        for number, stream in zip((1, 2), self._streams, strict=False):
            os.dup2(stream, number)
            os.close(stream)
        with suppress(OSError):  # a full disk, which `note` has reported
            self._file.close()

    def take_streams(self) -> None:
        """Redirect the output of this process, and of the libraries in it, to the log; not on rank 0.

        Python's warnings go into the log on every rank. Where `moetune train` keeps the ranks' standard error, rank 0
        writes messages for the user to standard output.
        """
        _WARNINGS.addHandler(self._noted)
        _WARNINGS.propagate = False
        logging.captureWarnings(True)
        if self.rank == 0:
            if LAUNCHER_LOGS in os.environ:
                sys.stderr = self.terminal = sys.stdout
            return
        sys.stdout.flush()
        self._streams = [os.dup(1), os.dup(2)]
        self.terminal = os.fdopen(os.dup(2), "w", buffering=1)
        for number in (1, 2):
            os.dup2(self._file.fileno(), number)


class _Noted(logging.Handler):
    """Writes records into a rank's log."""

    def __init__(self, log: RankLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.note(record.getMessage().rstrip())


def remove_logs(logs: Path) -> None:
    """Remove the logs of a dry run, and the folders around them that are then empty."""
    shutil.rmtree(logs, ignore_errors=True)
    with suppress(OSError):
        for folder in logs.parents[:-1]:
            folder.rmdir()

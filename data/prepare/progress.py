"""A bar on a terminal, a line now and then in a log file."""

import sys
import time
from pathlib import Path
from typing import TextIO

_WIDTH = 30
_LOG_SECONDS = 60.0


class Progress:
    """Shows how many of `total` rows are done; with total 0 only how many. `rows` is what they are called."""

    def __init__(self, label: str, total: int, *, rows: str = "rows", out: TextIO | None = None) -> None:
        self._label, self._rows = label, rows
        self._total = total
        self._out = sys.stderr if out is None else out
        self._shown = time.monotonic()

    def __call__(self, done: int, refused: int | None = None) -> None:
        """Draws the bar again; in a file a line a minute, and one at the end."""
        text = f"{self._label}: {done}"
        if self._total:
            full = _WIDTH * done // self._total
            text = f"{self._label}: [{'#' * full}{' ' * (_WIDTH - full)}] {done}/{self._total}"
        text += f" {self._rows}" + ("" if refused is None else f", {refused} refused")
        at_end = done >= self._total > 0
        if self._out.isatty():
            self._out.write(f"\r{text}" + ("\n" if at_end else ""))
            self._out.flush()
        elif at_end or time.monotonic() - self._shown > _LOG_SECONDS:
            self._shown = time.monotonic()
            self._out.write(text + "\n")


def count_rows(path: Path) -> int:
    """Rows of a .jsonl file; 0 for a list, whose length is not known before it is read."""
    if path.suffix != ".jsonl":
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())

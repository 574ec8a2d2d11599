"""A bar on a terminal; in a log file, a line once a minute and one at the end."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TextIO, TypeVar

T = TypeVar("T")

_WIDTH = 30
_LOG_SECONDS = 60.0
_DRAW_SECONDS = 0.1


class Progress:
    """Shows how many of `total` items are done; with total 0, only how many. `unit` is what the items are called.

    Use it as a context: on leaving, the line is complete, so that nothing else is printed on it.
    """

    def __init__(self, label: str, total: int, *, unit: str = "rows", out: TextIO | None = None) -> None:
        self._label, self._unit = label, unit
        self._total = total
        self._out = sys.stderr if out is None else out
        self._shown = time.monotonic() if not self._out.isatty() else 0.0
        self._text = ""
        self._printed = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._text != self._printed:
            self._show()
        if self._printed and self._out.isatty():
            self._out.write("\n")
            self._out.flush()

    def __call__(self, done: int, more: str = "") -> None:
        """Note how many are done, and `more` to say; the line is rewritten when it is time to."""
        text = f"{self._label}: {done:,}"
        if self._total:
            full = _WIDTH * done // self._total
            text = f"{self._label}: [{'#' * full}{' ' * (_WIDTH - full)}] {done:,}/{self._total:,}"
        self._text = f"{text} {self._unit}" + (f", {more}" if more else "")
        if time.monotonic() - self._shown > (_DRAW_SECONDS if self._out.isatty() else _LOG_SECONDS):
            self._show()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count each when the next one is asked for."""
        for done, item in enumerate(items, 1):
            yield item
            self(done)

    def _show(self) -> None:
        self._shown = time.monotonic()
        start, end = ("\r", "") if self._out.isatty() else ("", "\n")
        # blanks wipe what is left of a longer line
        self._out.write(start + self._text + (" " * (len(self._printed) - len(self._text)) if start else "") + end)
        self._out.flush()
        self._printed = self._text

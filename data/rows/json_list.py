"""Reads a JSON list entry by entry, so that a large file does not have to fit into memory."""

import codecs
from collections.abc import Iterator
from typing import Any, BinaryIO

from data.format.record import decode_json

_BLOCK = 1 << 20
MAX_ROW = 1 << 28
"""Most characters of one row, which is parsed in memory."""


def read_list(file: BinaryIO) -> Iterator[Any]:
    """Yield the entries of a JSON list; ValueError if the text is not a list, or not JSON."""
    text = _Text(file)
    if text.next_mark() != "[":
        raise ValueError(f"it begins with {text.next_mark()!r}, not with the [ of a list")
    text.skip(1)
    if text.next_mark() == "]":
        text.skip(1)
    else:
        yield text.value()
        while text.next_mark() == ",":
            text.skip(1)
            yield text.value()
        if text.next_mark() != "]":
            raise ValueError(f"an entry of the list is followed by {text.next_mark()!r}, not by a comma or ]")
        text.skip(1)
    if text.next_mark():
        raise ValueError(f"the list is followed by {text.next_mark()!r}")


class _Text:
    """A window of the text: what is read already is dropped."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._at = 0
        self._ended = False

    def next_mark(self) -> str:
        """Return the next character that is not a blank, without taking it; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_BLOCK):
                return ""

    def skip(self, count: int) -> None:
        self._at += count

    def value(self) -> Any:
        """Return the next value. One that is cut off by the window is tried again with twice the text."""
        self.next_mark()
        while True:
            problem: ValueError | None = None
            try:
                value, end = decode_json(self._text, self._at)
            except ValueError as error:
                problem, end = error, len(self._text)
            # a number may go on behind the window, so a value counts only if something follows it
            if problem is None and (end < len(self._text) or self._ended):
                self._at = end
                return value
            waiting = len(self._text) - self._at
            if waiting > MAX_ROW:
                raise ValueError(f"an entry has more than {MAX_ROW:,} characters")
            if not self._more(max(_BLOCK, waiting)) and problem is not None:
                raise problem

    def _more(self, count: int) -> bool:
        """Read on; False at the end of the file."""
        data = self._file.read(count)
        self._ended = not data
        self._text = self._text[self._at :] + self._decode(data, final=not data)
        self._at = 0
        return bool(data)

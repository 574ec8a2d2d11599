"""Text for people: counts with their nouns, and text of data that cannot steer a terminal. No torch."""

import re

# control characters but newline and tab, and those that turn the direction of writing around
_STEERING = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def printable(text: str) -> str:
    """Return the text with each such character as its number: an escape sequence is shown, not obeyed."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return the same on one line."""
    return printable(text).replace("\n", "\\n")


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: `1 shard`, `1,200 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_of(number: int) -> str:
    """Return a number of bytes in the largest decimal unit that it fills: `1.2 GB`."""
    size = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

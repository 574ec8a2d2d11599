"""Text of data as a terminal may be given it: what would steer the terminal stands there as text. No torch."""

import re

# control characters but newline and tab, and those that turn the direction of writing around
_STEERING = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def printable(text: str) -> str:
    """The text, each such character by its number: an escape sequence is shown, not obeyed."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same on a line of its own."""
    return printable(text).replace("\n", "\\n")

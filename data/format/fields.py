"""Reads a JSON object strictly: wrong types, missing and unknown keys are errors that name the field. No torch."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_REQUIRED: Any = object()


_USER = re.compile(r"(\w+://)[^\s/?#@]*@")
_QUERY = re.compile(r"(\w+://[^\s?'\"]*)\?[^\s'\"]+")


def redact(text: str) -> str:
    """Return the text without the secrets of its urls: user, password, and the query, where signatures and keys are."""
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))


class BadField(ValueError):
    """A field of a record is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {redact(problem)}")


def check_text(value: str, where: str) -> str:
    """Return the text if it can be written as UTF-8: JSON escapes can hold half of a character."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadField(where, f"holds half a character (a lone surrogate) at offset {error.start}") from error
    return value


class Fields:
    """A JSON object while it is read; `done` refuses keys that were not read."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = dict(raw)
        self._known: list[str] = []
        self.where = f"{where}." if where else ""

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Return the value under `name`, of one of these types; null counts as absent."""
        self._known.append(name)
        value = self._raw.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise BadField(self.where + name, "is missing")
            return default
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise BadField(self.where + name, f"is {value!r:.80} ({type(value).__name__}); write {names}")
        if isinstance(value, (int, float)) and not (math.isfinite(value) if isinstance(value, float) else True):
            raise BadField(self.where + name, f"is {value}; write a finite number")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return text that can be written as UTF-8."""
        value = self.take(name, str, default)
        return value if value is None else check_text(value, self.where + name)

    def choice(self, name: str, allowed: Sequence[str], default: Any = _REQUIRED) -> str:
        """Return one of the allowed words."""
        value: str = self.take(name, str, default)
        if value not in allowed:
            raise BadField(self.where + name, f"is {value!r:.80}; write one of {', '.join(allowed)}")
        return value

    def number(self, name: str, default: Any = None, *, above: float = -math.inf, least: float = -math.inf) -> Any:
        """Return a finite number > above and >= least."""
        value = self.take(name, (int, float), default)
        if value is not None and not (value > above and value >= least and value <= 1e15):
            bound = f"above {above}" if above > least else f"at least {least}"
            raise BadField(self.where + name, f"is {value}; write a number {bound}")
        return value

    def whole(self, name: str, default: Any = None, *, least: int = 1) -> Any:
        """Return a whole number >= least."""
        value = self.take(name, int, default)
        if value is not None and not least <= value <= 10**15:
            raise BadField(self.where + name, f"is {value}; write a whole number of at least {least}")
        return value

    def items(self, name: str) -> Iterator[tuple[Any, str]]:
        """Yield the entries of a list that may be absent, each with its place."""
        for index, item in enumerate(self.take(name, list, [])):
            yield item, f"{self.where}{name}[{index}]"

    def objects(self, name: str) -> Iterator["Fields"]:
        """Yield the entries of a list of JSON objects."""
        for item, where in self.items(name):
            yield Fields(self.take_object(item, where), where)

    @staticmethod
    def take_object(item: Any, where: str) -> Mapping[str, Any]:
        """Return the entry if it is a JSON object."""
        if not isinstance(item, Mapping):
            raise BadField(where, f"is {item!r:.80} ({type(item).__name__}); write a JSON object")
        return item

    def done(self) -> None:
        """Refuse keys that were not read: a misspelt key must not be ignored."""
        if self._raw:
            unknown = ", ".join(sorted(map(repr, self._raw)))
            raise BadField(
                self.where.rstrip(".") or "record", f"has unknown keys {unknown:.200}; known: {', '.join(self._known)}"
            )

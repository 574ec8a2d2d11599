"""Reads JSON files and checks every value; each error names the file and the key. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def load_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError if the file is missing, unreadable or not an object."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; a model folder needs it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must contain a JSON object, not a {type(content).__name__}")
    return content


@dataclass(frozen=True, kw_only=True)
class Block:
    """One object of a config.json, with its file and key for error messages."""

    file: Path
    key: str
    values: dict[str, Any]

    def get(self, key: str, kind: Callable[[Any], Any], *, instead: str = "", default: Any = None) -> Any:
        """Return the value at `key` (or at its other spelling `instead`) after checking it with `kind`."""
        for name in (key, instead):
            if name and self.values.get(name) is not None:
                try:
                    return kind(self.values[name])
                except TypeError as error:
                    raise ValueError(
                        f"{self.file}: {self.key}{name} must be {error}, got {self.values[name]!r}"
                    ) from None
        if default is not None:
            return default
        spelt = f"{self.key}{key}" + (f" (or {instead})" if instead else "")
        raise ValueError(f"{self.file} lacks {spelt}; the model depends on it, and no default would be safe")

    def block(self, key: str) -> Block:
        """Return the object at `key`."""
        return Block(file=self.file, key=f"{self.key}{key}.", values=self.get(key, as_object))


def as_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else raise TypeError with the expected type; so do the others below."""
    if not isinstance(value, dict):
        raise TypeError("an object")
    return value


def as_count(value: Any) -> int:
    """Return `value` if it is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TypeError("a whole number above 0")
    return value


def as_token(value: Any) -> int:
    """Return `value` if it can be a token id."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError("a token id")
    return value


def as_number(value: Any) -> float:
    """Return `value` if it is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("a number")
    return value


def as_flag(value: Any) -> bool:
    """Return `value` if it is true or false."""
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def as_word(value: Any) -> str:
    """Return `value` if it is a string."""
    if not isinstance(value, str):
        raise TypeError("a string")
    return value


def as_indexes(value: Any) -> tuple[int, ...]:
    """Return `value` as a tuple if it is a list of whole numbers of 0 or more."""
    if not isinstance(value, list) or not all(isinstance(each, int) and each >= 0 for each in value):
        raise TypeError("a list of whole numbers")
    return tuple(value)

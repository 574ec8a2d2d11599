"""The columns that moetune knows, and `map`, which names them in data that call them something else."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from data.format.fields import BadField
from data.format.record import load_json

OURS = ("id", "source", "group", "license", "objects", "answers")
"""Columns that every shape may have, and that the record keeps."""
MEDIA = ("image", "images", "video", "videos")
ALWAYS = (*OURS, *MEDIA, "v", "system", "tools")
"""Columns that are read whatever the shape is."""
TEXT = (
    *("messages", "conversations", "conversation", "prompt", "completion", "instruction", "input", "output"),
    *("query", "response", "history", "question", "answer", "texts", "text", "caption", "content", "parts"),
    *("interleaved", "sequence", "text_list", "image_info", "goal", "task", "steps", "actions", "screens"),
    *("start", "end", "timestamps", "sentences", "frames"),
)
KNOWN = (*ALWAYS, *TEXT)
"""The names that `map` may give a meaning to."""
_STRUCTURED = (
    *("messages", "conversations", "conversation", "history", "texts", "images", "videos", "objects", "answers"),
    *("steps", "actions", "screens", "timestamps", "sentences", "parts", "interleaved", "sequence", "image_info"),
)
"""Columns that hold lists or objects, which tables of text and some parquet files write as JSON."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for the closest of these words, or nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class Columns:
    """A `map`: each known column with the column of the data that it is read from, or several."""

    names: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Columns":
        """Check a `map`; ValueError for a column that nothing reads, and for names that are not text."""
        names = []
        for ours, theirs in sorted(raw.items()):
            if ours not in KNOWN:
                raise ValueError(
                    f"maps to {ours!r}, which nothing reads{nearest(ours, KNOWN)} (known: {', '.join(KNOWN)})"
                )
            given = [theirs] if isinstance(theirs, str) else theirs
            if not isinstance(given, (list, tuple)) or not given or not all(isinstance(name, str) for name in given):
                raise ValueError(f"maps {ours} to {theirs!r:.80}; write the name of a column, or a list of names")
            names.append((ours, tuple(given)))
        return cls(tuple(names))

    @classmethod
    def read(cls, text: str) -> "Columns":
        """Return the map that a text holds."""
        return cls.of(load_json(text)) if text else cls()

    @property
    def text(self) -> str:
        """The map as JSON; empty where nothing is mapped."""
        return json.dumps(dict(self.names), sort_keys=True) if self.names else ""

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row with the mapped columns under their known names."""
        taken = {name.partition(".")[0] if name not in row else name for _, theirs in self.names for name in theirs}
        out = {name: value for name, value in row.items() if name not in taken}
        for ours, theirs in self.names:
            values = [value for name in theirs if (value := look_up(row, name)) is not None]
            if len(theirs) > 1:
                out[ours] = [one for value in values for one in (value if isinstance(value, list) else [value])]
            elif values:
                out[ours] = values[0]
        return out

    def unknown(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the names of the map that none of these rows has."""
        seen = list(rows)
        named = [name for _, theirs in self.names for name in theirs]
        return [name for name in named if not any(has_column(row, name) for row in seen)]


def look_up(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or of a key inside one (`json.caption`); None if the row has neither."""
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first)
    if isinstance(inner, str) and inner[:1] == "{":
        inner = decoded(inner)
    return look_up(inner, rest) if dot and isinstance(inner, Mapping) else None


def has_column(row: Mapping[str, Any], name: str) -> bool:
    """Say whether the row has the column, or the key inside one; its value may be empty."""
    if name in row:
        return True
    first, dot, rest = name.partition(".")
    inner = row.get(first)
    if isinstance(inner, str) and inner[:1] == "{":
        inner = decoded(inner)
    return bool(dot) and isinstance(inner, Mapping) and has_column(inner, rest)


def with_lists(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with the JSON text of columns that hold lists or objects read."""
    written = [name for name in _STRUCTURED if isinstance(row.get(name), str) and row[name][:1] in ("[", "{")]
    return {**row, **{name: decoded(row[name]) for name in written}}


def decoded(text: str) -> Any:
    """Return what the JSON text says, or the text itself if it is not JSON."""
    try:
        return load_json(text)
    except ValueError:
        return text


def text_at(row: Mapping[str, Any], name: str) -> str:
    """Return the text of a column; BadField for anything else."""
    value = row.get(name)
    if not isinstance(value, str):
        raise BadField(name, "is missing" if value is None else f"is {value!r:.80}; write text")
    return value

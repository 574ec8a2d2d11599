"""A sample of a foreign tar as a row: its members are the columns, named by what follows the key. No torch.

Text is read, and never unpickled; images and videos stay where they are, as `{"member": name}`.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.format.fields import BadField
from data.format.record import load_json
from data.rows.columns import KNOWN, MEDIA, Columns
from data.rows.convert import convert_row
from data.rows.media import place_of
from data.rows.shapes import is_known

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif")
VIDEOS = ("mp4", "mkv", "webm")
TEXTS = ("json", "txt", "npy")
AUTO = "auto"
"""The layout of a shard whose members speak for themselves."""
_TURNS = ("messages", "conversations", "conversation", "question", "query", "prompt", "instruction", "texts")
_KNOWN = (
    "our record as json; an image or a video with txt, or with a caption in json; json of a known shape with its media"
)


@dataclass(frozen=True)
class Layout:
    """The way from the members of a foreign sample to a row: by `map`, or where there is none, by their types."""

    columns: Columns = field(default_factory=Columns)

    @property
    def text(self) -> str:
        """The layout as an index keeps it."""
        return self.columns.text or AUTO

    @classmethod
    def read(cls, text: str) -> "Layout":
        """Return the layout that an index keeps."""
        return cls(Columns() if text == AUTO else Columns.read(text))

    def record(self, names: Sequence[str], read: Callable[[str], bytes]) -> dict[str, Any]:
        """Return our record as a JSON object; `read` returns the bytes of a member of text."""
        row: dict[str, Any] = {name: _value(name, read) for name in names if self._uses(name)}
        row = self._mapped(row, names) if self.columns.names else _by_types(row, names)
        raw, _ = convert_row(row)
        return raw | {kind: [_place(item, kind) for item in raw[kind]] for kind in ("images", "videos") if kind in raw}

    def _uses(self, name: str) -> bool:
        """Say whether a member is read: those that `map` names, or all that may speak for themselves."""
        if not self.columns.names:
            return type_of(name) not in ("", "npy")
        named = [one for _, theirs in self.columns.names for one in theirs]
        return type_of(name) != "" and any(one == name or one.startswith(f"{name}.") for one in named)

    def _mapped(self, row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        for ours, theirs in self.columns.names:
            if ours in MEDIA and not any(name.partition(".")[0] in row or name in row for name in theirs):
                lacking, there = " and ".join(theirs), ", ".join(names)
                raise BadField("members", f"lack {lacking}, which `map` names as {ours}; there are {there}")
        return {name: value for name, value in self.columns.apply(row).items() if name in KNOWN}


def type_of(name: str) -> str:
    """Return the type of a member that is read; empty for any other, such as a pickle."""
    ending = name.rpartition(".")[2]
    return ending if ending in (*IMAGES, *VIDEOS, *TEXTS) else ""


def named_members(raw: Mapping[str, Any]) -> list[str]:
    """Return the members that the media of a record are."""
    places = [*raw.get("images", ()), *raw.get("videos", ())]
    return [place["member"] for place in places if isinstance(place, Mapping) and "member" in place]


def _value(name: str, read: Callable[[str], bytes]) -> Any:
    kind = type_of(name)
    if kind not in TEXTS:
        return {"member": name}
    data = read(name)
    if kind == "json":
        return load_json(data)
    if kind == "txt":
        return data.decode()
    return np.load(io.BytesIO(data), allow_pickle=False).tolist()


def _by_types(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the row that the types of its members tell: json of a known shape, or media with a caption."""
    notes = next((row[name] for name in row if type_of(name) == "json"), None)
    text = next((row[name] for name in row if type_of(name) == "txt"), None)
    if isinstance(notes, list):
        talks = all(isinstance(turn, Mapping) and ("from" in turn or "role" in turn) for turn in notes)
        notes = {"conversations" if talks else "sequence": notes}
    notes = notes if isinstance(notes, dict) else {}
    media = {
        "image": [row[name] for name in row if type_of(name) in IMAGES],
        "video": [row[name] for name in row if type_of(name) in VIDEOS],
    }
    if text is not None and not any(notes.get(name) is not None for name in _TURNS):
        notes = {"text": text}
    out = {name: value for name, value in notes.items() if name not in MEDIA}
    for kind, members in media.items():
        given = notes.get(kind) or notes.get(f"{kind}s") or []
        out[f"{kind}s"] = _members_for(given if isinstance(given, list) else [given], members)
    if not is_known(out):
        raise BadField(
            "sample",
            f"has the members {', '.join(names)}, which are no known layout. Known: {_KNOWN}. Name other members with "
            f"`map` (data.sources.<name>.map)",
        )
    return out


def _members_for(given: list[Any], members: list[dict[str, str]]) -> list[Any]:
    """Return the members that the entries of json name: by their names, or one for one; all of them for no entry."""
    if not given:
        return list(members)
    by_name = {member["member"]: member for member in members}

    def find(item: Any) -> Any:
        name = item.rpartition("/")[2].lower() if isinstance(item, str) else ""
        return by_name.get(name) or by_name.get(name.partition(".")[2])

    named = [item for item in given if item is not None]  # OBELICS has None where a text is
    found = [find(item) for item in named]
    if not all(found) or len({member["member"] for member in found}) < len(found):
        if len(named) != len(members):
            return given
        found = list(members)
    return [None if item is None else found.pop(0) for item in given]


def _place(item: Any, kind: str) -> Any:
    """Return a medium as a record names it."""
    if isinstance(item, Mapping) and "member" in item:
        return dict(item)
    place, more = place_of(item, kind)
    if "bytes" in place:
        raise BadField(kind, "hold a medium inside json: `moetune shards build` makes members of such media")
    return {**place, **more}

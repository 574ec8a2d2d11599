"""Reads and writes what a message holds: text with marks, or a list of objects. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data.format.fields import BadField, Fields, check_text

MARKS = {"<image>": "image", "<video>": "video", "<ref-object>": "ref", "<bbox>": "bbox", "<point>": "point"}
KINDS = ("text", *MARKS.values())
_MARK = re.compile("|".join(map(re.escape, MARKS)))
_SPELLED = {kind: mark for mark, kind in MARKS.items()}


@dataclass(frozen=True)
class Content:
    """A piece of text, or a place that the sample's next image, video, reference, box or point takes."""

    kind: Literal["text", "image", "video", "ref", "bbox", "point"]
    text: str = ""


def read_contents(content: str | list[Any], where: str) -> tuple[Content, ...]:
    """Return the contents of a message. Marks in plain text are places; in a list of objects, text is only text."""
    if isinstance(content, str):
        return tuple(_split_marks(check_text(content, where)))
    return tuple(_read_content(item, f"{where}[{index}]") for index, item in enumerate(content))


def _split_marks(text: str) -> list[Content]:
    contents, at = [], 0
    for mark in _MARK.finditer(text):
        if mark.start() > at:
            contents.append(Content("text", text[at : mark.start()]))
        contents.append(Content(MARKS[mark.group()]))  # type: ignore[arg-type]  # a value of MARKS is a kind
        at = mark.end()
    if at < len(text):
        contents.append(Content("text", text[at:]))
    return contents


def _read_content(item: Any, where: str) -> Content:
    if not isinstance(item, Mapping):
        raise BadField(where, f"is {item!r:.80}; write {{'type': 'text', 'text': ...}} or {{'type': 'image'}}")
    fields = Fields(item, where)
    kind = fields.choice("type", KINDS)
    text = fields.text("text") if kind == "text" else ""
    fields.done()
    return Content(kind, text)  # type: ignore[arg-type]  # choice() has checked it against KINDS


def write_contents(contents: tuple[Content, ...]) -> str | list[dict[str, str]]:
    """Return plain text with marks where that reads back equal, else a list of objects."""
    plain = "".join(item.text if item.kind == "text" else _SPELLED[item.kind] for item in contents)
    if read_contents(plain, "content") == contents:
        return plain
    return [{"type": "text", "text": item.text} if item.kind == "text" else {"type": item.kind} for item in contents]

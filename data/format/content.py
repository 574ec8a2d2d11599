"""Content of a message: text with marks, or a list of parts, to parts in order and back. No torch."""

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
class Part:
    """A piece of text, or the place of the next image, video, reference, box or point of the sample."""

    kind: Literal["text", "image", "video", "ref", "bbox", "point"]
    text: str = ""


def read_parts(content: str | list[Any], where: str) -> tuple[Part, ...]:
    """Marks in plain text are places of media; in a list of parts, text is only text."""
    if isinstance(content, str):
        return tuple(_split_marks(check_text(content, where)))
    return tuple(_read_part(item, f"{where}[{index}]") for index, item in enumerate(content))


def _split_marks(text: str) -> list[Part]:
    parts, at = [], 0
    for found in _MARK.finditer(text):
        if found.start() > at:
            parts.append(Part("text", text[at : found.start()]))
        parts.append(Part(MARKS[found.group()]))  # type: ignore[arg-type]  # a value of MARKS is a kind
        at = found.end()
    if at < len(text):
        parts.append(Part("text", text[at:]))
    return parts


def _read_part(item: Any, where: str) -> Part:
    if not isinstance(item, Mapping):
        raise BadField(where, f"is {item!r:.80}; write {{'type': 'text', 'text': ...}} or {{'type': 'image'}}")
    fields = Fields(item, where)
    kind = fields.choice("type", KINDS)
    text = fields.text("text") if kind == "text" else ""
    fields.done()
    return Part(kind, text)  # type: ignore[arg-type]  # choice() has checked it against KINDS


def write_parts(parts: tuple[Part, ...]) -> str | list[dict[str, str]]:
    """Plain text with marks where that reads back equal, else a list of parts."""
    plain = "".join(part.text if part.kind == "text" else _SPELLED[part.kind] for part in parts)
    if read_parts(plain, "content") == parts:
        return plain
    return [{"type": "text", "text": part.text} if part.kind == "text" else {"type": part.kind} for part in parts]

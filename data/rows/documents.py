"""Shapes of interleaved documents: a row to one assistant's turn, which is learned as a whole."""

from collections.abc import Mapping
from typing import Any

from data.format.fields import BadField
from data.rows.chats import assistant

_LISTS = ("content", "parts", "interleaved", "sequence")


def list_of_parts(row: Mapping[str, Any]) -> Any:
    """Return the list of parts of a row, or None."""
    return next((row[name] for name in _LISTS if isinstance(row.get(name), list)), None)


def interleaved(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a list of parts: text, or objects with a text, an image or a video."""
    parts = []
    for at, part in enumerate(list_of_parts(row)):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise BadField(f"parts[{at}]", f"is {part!r:.80}; write text, or an object with text, image or video")
        given = {name: value for name, value in part.items() if value is not None}
        if "type" not in given:
            kind = next((name for name in ("text", "image", "video") if name in given), "")
            given = {"type": kind, **given} if kind else given
        parts.append(given)
    return _document(parts)


def obelics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read OBELICS' two lists, in which one of each pair is None."""
    texts, images = row["texts"], row["images"]
    if len(texts) != len(images):
        raise BadField("images", f"has {len(images)} entries for {len(texts)} of texts; OBELICS has as many")
    parts: list[dict[str, Any]] = []
    for at, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise BadField(f"texts[{at}]", f"and images[{at}] must be a text or an image, and not both")
        if text is not None and not isinstance(text, str):
            raise BadField(f"texts[{at}]", f"is {text!r:.80}; write text")
        parts.append({"type": "image", "image": image} if text is None else {"type": "text", "text": text})
    return _document(parts)


def mmc4(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read MMC4's sentences and images, each of which goes before the sentence that it matches."""
    sentences = row["text_list"]
    before: dict[int, list[dict[str, Any]]] = {}
    for at, image in enumerate(row["image_info"]):
        data = image.get("image_base64") if isinstance(image, Mapping) else None
        if not data:
            raise BadField(
                f"image_info[{at}]",
                "has no image_base64: MMC4 is published without its images, and most of its urls are dead. Get a copy "
                "that holds the images",
            )
        before.setdefault(image.get("matched_text_index"), []).append({"type": "image", "image": {"bytes": data}})
    strays = sorted(str(index) for index in before if index not in range(len(sentences)))
    if strays:
        raise BadField("image_info", f"matches sentence {strays[0]} of {len(sentences)}")
    parts: list[dict[str, Any]] = []
    for at, sentence in enumerate(sentences):
        parts += before.get(at, [])
        parts.append({"type": "text", "text": sentence if not parts else f"\n{sentence}"})
    return _document(parts)


def _document(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": [assistant(parts)], "images": None}

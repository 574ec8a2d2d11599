"""Finds the images and videos of rows written for other tools. No decoder, no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from data.format.fields import BadField, redact
from data.rows.refused import refuse_dicom

Put = Callable[[dict[str, Any], str], dict[str, Any]]
"""Receives the place of a medium and its name for messages; returns the place for the record."""


def media_entries(raw: Mapping[str, Any], *, image: Put, video: Put) -> dict[str, list[dict[str, Any]]]:
    """Return the `images` and `videos` of a record, from a converted row; empty lists are left out."""
    images = [_entry(item, f"images[{n}]", image) for n, item in enumerate(raw.get("images", ()))]
    videos = [_video(item, f"videos[{n}]", image, video) for n, item in enumerate(raw.get("videos", ()))]
    return {name: entries for name, entries in (("images", images), ("videos", videos)) if entries}


def _entry(item: Any, where: str, put: Put) -> dict[str, Any]:
    place, more = place_of(item, where)
    return {**put(place, where), **more}


def _video(item: Any, where: str, image: Put, video: Put) -> dict[str, Any]:
    if isinstance(item, list):  # ms-swift: a list of frames, two per second
        item = {"frames": item, "rate": 2.0}
    if isinstance(item, Mapping) and "frames" in item:
        frames = item["frames"] if isinstance(item["frames"], list) else []
        return {**item, "frames": [_entry(frame, f"{where}.frames[{n}]", image) for n, frame in enumerate(frames)]}
    return _entry(item, where, video)


def place_of(item: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (path, url or bytes with a range; the rest of the entry). Text is a path, a url, or base64."""
    if isinstance(item, str):
        item = {"path": item}
    if isinstance(item, bytes):  # a cell of a table
        item = {"bytes": item}
    if not isinstance(item, Mapping):
        raise BadField(where, f"is {item!r:.80}; write a path, a url, or an object with one of path, url, bytes")
    more = {name: value for name, value in item.items() if value is not None}
    place = {name: more.pop(name) for name in ("path", "url", "bytes", "range") if name in more}
    for name in ("image", "video"):  # Qwen's spelling of a place inside an object
        if name in more and not place:
            place["path"] = more.pop(name)
    text = place.get("path", place.get("url"))
    refuse_dicom(where, text if isinstance(text, str) else "")
    if "bytes" not in place:
        if not isinstance(text, str) or not text:
            raise BadField(where, f"is {item!r:.80}; write a path, a url, or an object with one of path, url, bytes")
        place = {**_spelled(text, where), **({"range": place["range"]} if "range" in place else {})}
    span = place.get("range")
    if span is not None and (not isinstance(span, list) or len(span) != 2 or not all(type(n) is int for n in span)):
        raise BadField(f"{where}.range", f"is {span!r:.80}; write [offset, length]")
    return place, more


_BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk0")
"""How the base64 of a JPEG, PNG, WebP, GIF and BMP begins."""
_LONGEST_PATH = 4096


def _spelled(text: str, where: str) -> dict[str, Any]:
    if len(text) > _LONGEST_PATH and text.startswith(_BASE64):
        return {"bytes": text}
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadField(where, f"is {text[:40]!r}; a data: url must be base64")
        return {"bytes": body}
    if text.startswith(("http://", "https://")):
        return {"url": text}
    if "://" in text and not text.startswith("file://"):
        raise BadField(where, f"is {redact(text)!r:.80}; only paths, http:// and https:// are read")
    return {"path": text.removeprefix("file://")}

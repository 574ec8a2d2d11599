"""One row of JSON to the members of one sample: media found, cleaned, named; the record checked as a reader would."""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.format.fields import BadField, redact
from data.format.media import Place
from data.format.record import parse_record, record_to_json
from data.prepare.clean import clean_image, clean_video
from data.prepare.convert import convert_row
from data.shards.bytes import ByteReader, Places, read_media
from data.shards.scan import probe_media


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Where relative media are found, where the shards will be, and whether media go into them."""

    folder: Path  # of the shards
    origin: Path  # of relative paths in rows, unless `places` has a root
    media: Literal["embed", "reference"]
    places: Places


def build_sample(row: Any, options: RowOptions, *, key: str, shard: str) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Members of the sample, record first, and unused columns. ValueError with the reason to refuse the row."""
    if isinstance(row, ValueError):
        raise row
    raw, ignored = convert_row(row)
    with closing(ByteReader(options.places)) as reader:
        media = _RowMedia(options, reader)
        images = [media.image(item, f"images[{n}]") for n, item in enumerate(raw.get("images", ()))]
        videos = [media.video(item, f"videos[{n}]") for n, item in enumerate(raw.get("videos", ()))]
        raw |= {name: value for name, value in (("images", images), ("videos", videos)) if value}
        record = parse_record(raw, shard=shard, key=key, members=media.members)
        if not record.supervised:
            raise BadField("messages", "carry no loss: nothing would be learned")
        probe_media(record, *read_media(record, media.members, options.folder, reader))
    text = json.dumps(record_to_json(record), ensure_ascii=False).encode()
    return [("json", text), *media.members.items()], ignored


class _RowMedia:
    """Reads, cleans and names the media of one row; `members` are those that go into the shard."""

    def __init__(self, options: RowOptions, reader: ByteReader) -> None:
        self._options, self._reader = options, reader
        self.members: dict[str, bytes] = {}

    def image(self, item: Any, where: str) -> dict[str, Any]:
        """The image as the record names it."""
        place, more = _place_of(item, where)
        if self._stays_outside(place):
            return {**self._refer(place), **more}
        return {"member": self._add(*clean_image(self._load(place, where), name=where)), **more}

    def video(self, item: Any, where: str) -> dict[str, Any]:
        """The video as the record names it."""
        if isinstance(item, list):  # ms-swift: a list of frames, two a second
            item = {"frames": item, "rate": 2.0}
        if isinstance(item, Mapping) and "frames" in item:
            frames = item["frames"] if isinstance(item["frames"], list) else []
            return {**item, "frames": [self.image(frame, f"{where}.frames[{n}]") for n, frame in enumerate(frames)]}
        place, more = _place_of(item, where)
        if self._stays_outside(place):
            return {**self._refer(place), **more}
        return {"member": self._add(*clean_video(self._load(place, where))), **more}

    def _stays_outside(self, place: dict[str, Any]) -> bool:
        return self._options.media == "reference" and "bytes" not in place

    def _load(self, place: dict[str, Any], where: str) -> bytes:
        if "bytes" in place:
            try:
                return base64.b64decode(place["bytes"], validate=True)
            except (binascii.Error, ValueError, TypeError) as error:
                raise BadField(where, f"is not base64: {error}") from error
        span = (place["range"][0], place["range"][1]) if place.get("range") is not None else None
        source = Place(path=place.get("path"), url=place.get("url"), range=span)
        return self._reader.read_place(source, self._options.origin)

    def _refer(self, place: dict[str, Any]) -> dict[str, Any]:
        if "path" not in place:
            return place
        if (root := self._options.places.root) is not None:  # relative to it, wherever the shards go
            return {**place, "path": os.path.relpath(root / place["path"], root)}
        return {**place, "path": os.path.relpath(self._options.origin / place["path"], self._options.folder)}

    def _add(self, data: bytes, extension: str) -> str:
        name = f"{len(self.members)}.{extension}"
        self.members[name] = data
        return name


def _place_of(item: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(path, url or bytes with a range; the rest). Text is a path, a url or a data: url."""
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, Mapping):
        raise BadField(where, f"is {item!r:.80}; write a path, a url, or an object with one of path, url, bytes")
    more = {name: value for name, value in item.items() if value is not None}
    place = {name: more.pop(name) for name in ("path", "url", "bytes", "range") if name in more}
    for name in ("image", "video"):  # Qwen's spelling of a place inside an object
        if name in more and not place:
            place["path"] = more.pop(name)
    text = place.get("path", place.get("url"))
    if "bytes" not in place:
        if not isinstance(text, str) or not text:
            raise BadField(where, f"is {item!r:.80}; write a path, a url, or an object with one of path, url, bytes")
        place = {**_spelled(text, where), **({"range": place["range"]} if "range" in place else {})}
    span = place.get("range")
    if span is not None and (not isinstance(span, list) or len(span) != 2 or not all(type(n) is int for n in span)):
        raise BadField(f"{where}.range", f"is {span!r:.80}; write [offset, length]")
    return place, more


def _spelled(text: str, where: str) -> dict[str, Any]:
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

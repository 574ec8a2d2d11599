"""One row of JSON to the members of one sample: media found, cleaned, named; the record checked as a reader would."""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.format.fields import BadField
from data.format.media import Place
from data.format.record import parse_record, record_to_json
from data.prepare.clean import clean_image, clean_video
from data.prepare.convert import convert_row
from data.shards.bytes import ByteReader
from data.shards.scan import probe_media


@dataclass(frozen=True, kw_only=True)
class RowBuilder:
    """Where relative media are found, where the shards will be, and whether media go into them."""

    folder: Path
    root: Path
    media: Literal["embed", "reference"]

    def build(self, row: Any, key: str, shard: str) -> tuple[list[tuple[str, bytes]], list[str]]:
        """Members of the sample, record first, and unused columns. ValueError with the reason to refuse the row."""
        if isinstance(row, ValueError):
            raise row
        raw, ignored = convert_row(row)
        reader = ByteReader()
        try:
            members: dict[str, bytes] = {}
            images = [
                self._image(item, f"images[{n}]", members, reader) for n, item in enumerate(raw.get("images", ()))
            ]
            videos = [
                self._video(item, f"videos[{n}]", members, reader) for n, item in enumerate(raw.get("videos", ()))
            ]
            raw |= {name: value for name, value in (("images", images), ("videos", videos)) if value}
            record = parse_record(raw, shard=shard, key=key, members=members)
            if not record.supervised:
                raise BadField("messages", "carry no loss: nothing would be learned")
            self._probe(record, members, reader)
        finally:
            reader.close()
        text = json.dumps(record_to_json(record), ensure_ascii=False).encode()
        return [("json", text), *members.items()], ignored

    def _probe(self, record: Any, members: dict[str, bytes], reader: ByteReader) -> None:
        def load(place: Place) -> bytes:
            return members[place.member] if place.member is not None else reader.read_place(place, self.folder)

        videos = [[load(frame) for frame in video.frames] if video.frames else load(video) for video in record.videos]
        probe_media(record, [load(image) for image in record.images], videos)

    def _image(self, item: Any, where: str, members: dict[str, bytes], reader: ByteReader) -> Any:
        place, more = _place_of(item, where)
        if self.media == "reference" and "bytes" not in place:
            return {**self._refer(place), **more}
        data, extension = clean_image(self._load(place, where, reader), name=where)
        return {"member": _add(members, data, extension), **more}

    def _video(self, item: Any, where: str, members: dict[str, bytes], reader: ByteReader) -> Any:
        if isinstance(item, list):  # ms-swift: a list of frames, two a second
            item = {"frames": item, "rate": 2.0}
        if isinstance(item, Mapping) and "frames" in item:
            frames = item["frames"] if isinstance(item["frames"], list) else []
            named = [self._image(frame, f"{where}.frames[{n}]", members, reader) for n, frame in enumerate(frames)]
            return {**item, "frames": named}
        place, more = _place_of(item, where)
        if self.media == "reference" and "bytes" not in place:
            return {**self._refer(place), **more}
        data, extension = clean_video(self._load(place, where, reader))
        return {"member": _add(members, data, extension), **more}

    def _load(self, place: dict[str, Any], where: str, reader: ByteReader) -> bytes:
        if "bytes" in place:
            try:
                return base64.b64decode(place["bytes"], validate=True)
            except (binascii.Error, ValueError, TypeError) as error:
                raise BadField(where, f"is not base64: {error}") from error
        span = place.get("range")
        found = Place(
            path=place.get("path"), url=place.get("url"), range=(span[0], span[1]) if span is not None else None
        )
        return reader.read_place(found, self.root)

    def _refer(self, place: dict[str, Any]) -> dict[str, Any]:
        if "path" in place:
            return {**place, "path": os.path.relpath(self.root / place["path"], self.folder)}
        return place


def _add(members: dict[str, bytes], data: bytes, extension: str) -> str:
    name = f"{len(members)}.{extension}"
    members[name] = data
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
        raise BadField(where, f"is {text[:80]!r}; only paths, http:// and https:// are read")
    return {"path": text.removeprefix("file://")}

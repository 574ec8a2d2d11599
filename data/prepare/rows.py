"""Turns a row of JSON into the members of a sample: finds and cleans its media, and checks its record."""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.format.fields import BadField
from data.format.media import Place
from data.format.record import parse_record, record_to_json
from data.prepare.clean import clean_image, clean_video
from data.prepare.convert import convert_row
from data.prepare.media_place import media_entries
from data.shards.bytes import ByteReader, Places, read_media
from data.shards.scan import probe_media


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Settings for one row: the folders of its media and of the shards, and whether media go into the shards."""

    folder: Path  # of the shards
    origin: Path  # of relative paths in rows, unless `places` has a root
    media: Literal["embed", "reference"]
    places: Places
    group: str = ""  # the column that becomes the record's group; empty: `group` itself


def build_sample(row: Any, options: RowOptions, *, key: str, shard: str) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Return the sample's members, record first, and unused columns; ValueError with the reason to refuse the row."""
    if isinstance(row, ValueError):
        raise row
    raw, ignored = convert_row(row)
    if options.group and (group := text_of(row, options.group)) is not None:
        raw["group"] = group
    ignored = [name for name in ignored if name != options.group]
    with closing(ByteReader(options.places)) as reader:
        media = _RowMedia(options, reader)
        raw |= media_entries(raw, image=media.image, video=media.video)
        record = parse_record(raw, shard=shard, key=key, members=media.members)
        if not record.supervised:
            raise BadField("messages", "carry no loss: nothing would be learned")
        probe_media(record, *read_media(record, media.members, options.folder, reader))
    text = json.dumps(record_to_json(record), ensure_ascii=False).encode()
    return [("json", text), *media.members.items()], ignored


def text_of(row: Mapping[str, Any], column: str) -> str | None:
    """Return a column's value as the name of a group; None if the row has none."""
    value = row.get(column)
    if value is not None and not isinstance(value, (str, int, float)):
        raise BadField(column, f"is {value!r:.80}; a group is named by text or a number")
    return None if value is None else str(value)


class _RowMedia:
    """Reads, cleans and names the media of one row; `members` are those that go into the shard."""

    def __init__(self, options: RowOptions, reader: ByteReader) -> None:
        self._options, self._reader = options, reader
        self.members: dict[str, bytes] = {}

    def image(self, place: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the place of an image, or the member that it becomes."""
        if self._stays_outside(place):
            return self._refer(place)
        return {"member": self._add(*clean_image(self._load(place, where), name=where))}

    def video(self, place: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the place of a video, or the member that it becomes."""
        if self._stays_outside(place):
            return self._refer(place)
        return {"member": self._add(*clean_video(self._load(place, where)))}

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

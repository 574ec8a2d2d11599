"""Turns a row into the members of its samples: finds and cleans its media, and checks its records."""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.format.fields import BadField
from data.format.media import Place
from data.format.record import parse_record, record_to_json
from data.prepare.clean import clean_image, clean_video
from data.rows.archive import inside_zip, read_member
from data.rows.columns import Columns, look_up
from data.rows.convert import convert_rows
from data.rows.media import media_entries
from data.rows.pdf import page_image, page_of
from data.rows.refused import refuse_dicom
from data.shards.bytes import ByteReader, Places, read_media
from data.shards.scan import probe_media

Members = list[tuple[str, bytes]]
"""The members of a sample by name, its record first."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Settings for one row: the folder of the shards, the columns, and whether media go into the shards."""

    folder: Path  # of the shards
    media: Literal["embed", "reference"]
    places: Places
    columns: Columns = field(default_factory=Columns)
    group: str = ""  # the column that becomes the record's group; empty: `group` itself


def build_samples(
    row: Any, options: RowOptions, *, origin: Path, key: str, shard: str
) -> tuple[list[tuple[str, Members]], list[str]]:
    """Return the key and the members of each sample, and unused columns; ValueError with the reason to refuse the row.

    Relative paths in the row begin at `origin`, unless the places have a root. Only the steps of an agent are several
    samples; they are of one group, so that a split keeps them together.
    """
    if isinstance(row, ValueError):
        raise row
    records, ignored = convert_rows(row, options.columns)
    group = text_of(row, options.group) if options.group else None
    samples = []
    with closing(ByteReader(options.places)) as reader:
        for number, raw in enumerate(records):
            if group is not None:
                raw["group"] = group
            elif len(records) > 1:
                raw.setdefault("group", raw.get("id", f"row {key}"))
            key_of_sample = f"{key}-{number:04d}" if len(records) > 1 else key
            samples.append((key_of_sample, _members(raw, options, reader, origin, key_of_sample, shard)))
    return samples, [name for name in ignored if name != options.group]


def _members(
    raw: dict[str, Any], options: RowOptions, reader: ByteReader, origin: Path, key: str, shard: str
) -> Members:
    media = _RowMedia(options, reader, origin)
    raw |= media_entries(raw, image=media.image, video=media.video)
    record = parse_record(raw, shard=shard, key=key, members=media.members)
    if not record.supervised:
        raise BadField("messages", "carry no loss: nothing would be learned")
    probe_media(record, *read_media(record, media.members, options.folder, reader))
    text = json.dumps(record_to_json(record), ensure_ascii=False).encode()
    return [("json", text), *media.members.items()]


def text_of(row: Mapping[str, Any], column: str) -> str | None:
    """Return a column's value as the name of a group; None if the row has none."""
    value = look_up(row, column)
    if value is not None and not isinstance(value, (str, int, float)):
        raise BadField(column, f"is {value!r:.80}; a group is named by text or a number")
    return None if value is None else str(value)


class _RowMedia:
    """Reads, cleans and names the media of one row; `members` are those that go into the shard."""

    def __init__(self, options: RowOptions, reader: ByteReader, origin: Path) -> None:
        self._options, self._reader = options, reader
        self._origin = origin
        self._table = inside_zip(origin / "table")
        self.members: dict[str, bytes] = {}

    def image(self, place: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the place of an image, or the member that it becomes."""
        page = page_of(place, where)
        if page is not None:
            source, number, dpi = page
            data = page_image(self._load(source, where), number, dpi, where)
            return {"member": self._add(*clean_image(data, name=where))}
        if self._stays_outside(place):
            return self._refer(place)
        data = self._load(place, where)
        refuse_dicom(where, "", data)
        return {"member": self._add(*clean_image(data, name=where))}

    def video(self, place: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the place of a video, or the member that it becomes."""
        if self._stays_outside(place):
            return self._refer(place)
        return {"member": self._add(*clean_video(self._load(place, where)))}

    def _stays_outside(self, place: dict[str, Any]) -> bool:
        return self._options.media == "reference" and "bytes" not in place and self._member(place) is None

    def _member(self, place: dict[str, Any]) -> tuple[Path, str] | None:
        """Return the zip and the member that a path names; the rows of a table in a zip name members of this zip."""
        if "path" not in place:
            return None
        if self._table is not None:
            archive, table = self._table
            return archive, os.path.normpath(os.path.join(os.path.dirname(table), place["path"]))  # noqa: PTH118, PTH120  # of a member, not of a file
        return inside_zip(self._options.places.find(place["path"], self._origin))

    def _load(self, place: dict[str, Any], where: str) -> bytes:
        data = place.get("bytes")
        if isinstance(data, bytes):
            return data
        if data is not None:
            try:
                return base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError, TypeError) as error:
                raise BadField(where, f"is not base64: {error}") from error
        if (inside := self._member(place)) is not None:
            return read_member(*inside)
        span = (place["range"][0], place["range"][1]) if place.get("range") is not None else None
        source = Place(path=place.get("path"), url=place.get("url"), range=span)
        return self._reader.read_place(source, self._origin)

    def _refer(self, place: dict[str, Any]) -> dict[str, Any]:
        if "path" not in place:
            return place
        if (root := self._options.places.root) is not None:  # relative to it, wherever the shards go
            return {**place, "path": os.path.relpath(root / place["path"], root)}
        return {**place, "path": os.path.relpath(self._origin / place["path"], self._options.folder)}

    def _add(self, data: bytes, extension: str) -> str:
        name = f"{len(self.members)}.{extension}"
        self.members[name] = data
        return name

"""The layout of a shard: our record, or the members of another tool's samples. No torch."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.format.record import Record, RecordError, load_json, parse_record
from data.format.tar import KeyedMembers, ShardError
from data.rows.energon import energon_columns
from data.rows.members import Layout, named_members
from data.shards.bytes import ByteReader, Places

OURS = ""
"""The layout of shards with our record, as an index keeps it."""
_LOOKED_AT = 8
"""Samples of a shard that show its layout."""


def declared_layout(shard: Path, places: Places) -> str:
    """Return the layout that the source's `map` or Energon's notes declare; empty where the members show it."""
    try:
        if mapped := places.map_of(shard):
            return mapped
        columns = energon_columns(shard)
    except ValueError as error:
        raise ShardError(shard, str(error)) from error
    return "" if columns is None else columns.text


def layout_of(shard: Path, samples: Sequence[KeyedMembers], reader: ByteReader) -> str:
    """Return the layout of a shard: as declared, or ours if one of the first samples has our record."""
    if declared := declared_layout(shard, reader.places):
        return declared
    first = [sample for sample in samples[:_LOOKED_AT] if sample.names]
    return OURS if not first or any(_has_record(shard, sample, reader) for sample in first) else Layout().text


def _has_record(shard: Path, sample: KeyedMembers, reader: ByteReader) -> bool:
    """Say whether the json of a sample is our record, which has a version; json that cannot be read may be one."""
    if "json" not in sample.names or sample.too_large:
        return sample.too_large != ""
    at = sample.names.index("json")
    try:
        raw = load_json(reader.read(shard, sample.offsets[at], sample.sizes[at]))
    except ValueError:
        return True
    return not isinstance(raw, Mapping | list) or (isinstance(raw, Mapping) and "v" in raw)


def parse_sample(layout: str, names: Sequence[str], read: Callable[[str], bytes], *, shard: str, key: str) -> Record:
    """Return the record of a sample; RecordError if it has none. `read` returns the bytes of a member."""
    if layout == OURS:
        if "json" not in names:
            dotted = " (a dot in the key?)" if any(name.endswith(".json") for name in names) else ""
            raise RecordError(shard=shard, key=key, reason=f"has no json member, only {sorted(names)}{dotted}")
        return parse_record(read("json"), shard=shard, key=key, members=[name for name in names if name != "json"])
    try:
        raw = _read(layout).record(names, read)
    except ValueError as error:
        raise RecordError(shard=shard, key=key, reason=str(error)) from error
    named = set(named_members(raw))
    return parse_record(raw, shard=shard, key=key, members=[name for name in names if name in named])


@lru_cache(maxsize=8)
def _read(layout: str) -> Layout:
    return Layout.read(layout)


def media_of(layout: str, record: Record, members: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the members that a record's media are: all but the record in our layout, those it names in others."""
    if layout == OURS:
        return {name: data for name, data in members.items() if name != "json"}
    places: list[Any] = [*record.images, *record.videos]
    return {place.member: members[place.member] for place in places if place.member is not None}

"""Splits shards into sides that share no group: patients, documents, trajectories stay together."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from pathlib import Path
from shutil import rmtree
from typing import Any

from data.format.media import Place
from data.format.record import Record, record_to_json
from data.format.tar import TarWriter
from data.prepare.build import CLAIM, key_of_row
from data.prepare.rows import text_of
from data.rows.columns import Columns
from data.rows.files import RowSource, read_source, stamp_of_rows
from data.shards.bytes import Places
from data.shards.reader import SampleReader
from data.shards.sidecar import read_note

KEPT = ("group", "key", "id", "source", "license")
"""Columns of a row that a shard keeps and that can name a group."""


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """Samples and groups of each side."""

    samples: dict[str, int]
    groups: dict[str, int]
    left_out: int  # unusable samples
    alone: int  # samples without the column, each of which is a group of its own
    first_alone: str  # where the first of them is; empty if there is none


def side_of(group: str, shares: Mapping[str, float], seed: int) -> str:
    """Return the side of a group, which follows from its name and the seed alone, whatever else the corpus holds."""
    point = int.from_bytes(blake2b(f"{seed}/{group}".encode(), digest_size=8).digest(), "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return list(shares)[-1]


def split_shards(
    shards: Sequence[Path],
    folder: Path,
    shares: Mapping[str, float],
    *,
    by: str = "group",
    seed: int = 0,
    samples_per_shard: int = 1000,
    cache_dir: Path | None = None,
    places: Places | None = None,
) -> SplitReport:
    """Copy every usable sample into `<folder>/<side>/`; samples with one value of the column `by` stay together."""
    if any(not 0 < share < 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9 or len(shares) < 2:
        raise ValueError(f"shares are {dict(shares)}; write two or more parts that sum to 1")
    taken = [name for name in shares if (folder / name).exists()]
    if taken:
        raise ValueError(f"{folder / taken[0]} exists already; split into an empty folder")
    reader = SampleReader(cache_dir=cache_dir, places=places)
    groups = _groups(shards, by, reader)
    alone = [place for place, (_, is_alone) in groups.items() if is_alone]
    if len(alone) == len(groups):
        raise ValueError(
            f"--by is {by!r}, which none of the {len(groups)} samples has; records keep {', '.join(KEPT)}. "
            f"Give another column, or --by key for samples that stand alone"
        )
    sides = {place: side_of(name, shares, seed) for place, (name, _) in groups.items()}
    counts = Counter(sides.values())
    empty = [name for name in shares if not counts[name]]
    if empty:
        raise ValueError(
            f"part {empty[0]} gets none of the {len(set(groups.values()))} groups; change --seed or the shares"
        )
    beside = {name: folder / f".{name}.{os.getpid()}.part" for name in shares}
    try:
        with ExitStack() as stack:
            writers = {name: stack.enter_context(_Side(beside[name], name, samples_per_shard)) for name in shares}
            for (shard, number), side in sides.items():
                writers[side].add(reader, shard, number)
        for name in shares:
            beside[name].rename(folder / name)
    finally:
        for path in beside.values():
            rmtree(path, ignore_errors=True)  # left only where the split failed: it may be repeated
    groups_of = {name: {groups[place] for place, side in sides.items() if side == name} for name in shares}
    first_alone = f"shard {alone[0][0].name}, sample {reader.index(alone[0][0]).keys[alone[0][1]]}" if alone else ""
    total = sum(len(reader.index(shard)) for shard in shards)
    reader.bytes.close()
    return SplitReport(
        samples={name: counts[name] for name in shares},
        groups={name: len(of_side) for name, of_side in groups_of.items()},
        left_out=total - len(sides),
        alone=len(alone),
        first_alone=first_alone,
    )


def _groups(shards: Sequence[Path], by: str, reader: SampleReader) -> dict[tuple[Path, int], tuple[str, bool]]:
    """Name the group of each usable sample, and say whether it is the sample's own, for want of a value."""
    columns: dict[Path, dict[str, str]] = {}
    groups = {}
    for shard in shards:
        index = reader.index(shard)
        if by not in KEPT and shard.parent not in columns:
            columns[shard.parent] = column_of_rows(shard.parent, by)
        for number, key in enumerate(index.keys):
            if number in index.problems:
                continue
            if by == "key":
                group: str | None = key
            elif by in KEPT:
                group = getattr(reader.record(shard, number), by) or None
            else:
                group = columns[shard.parent].get(key.partition("-")[0])  # the steps of a row follow a dash
            groups[shard, number] = (key, True) if group is None else (group, False)
    return groups


def column_of_rows(folder: Path, column: str) -> dict[str, str]:
    """Read a column that records do not keep, by key, from the rows that the shards in `folder` were built from."""
    note = read_note(folder / CLAIM)
    if note is None:
        raise ValueError(
            f"--by is {column!r}; records keep {', '.join(KEPT)}, and {folder} names no file of rows to read another "
            f"column from. Split by one of these, or build shards with `moetune shards build --group {column}`"
        )
    source = Path(os.path.normpath(folder / note["source"]))
    rows = RowSource(
        path=source,
        columns=Columns.read(note.get("map", "")),
        config=note.get("config", ""),
        split=note.get("split", ""),
    )
    if _stamp(rows) != note["stamp"]:
        raise ValueError(
            f"--by is {column!r}, which is read from {source}, and that file is gone or has changed since the build. "
            f"Build the shards again, with --group {column} to keep the column in them"
        )
    values = {}
    known: set[str] = set()
    for number, row, _ in read_source(rows):
        if not isinstance(row, Mapping):
            continue
        known.update(row)
        if (value := text_of(row, column)) is not None:
            values[key_of_row(number)] = value
    if not values:
        raise ValueError(
            f"--by is {column!r}, a column that no row of {source} has; there are {', '.join(sorted(known))}"
        )
    return values


def _stamp(rows: RowSource) -> str:
    """Return the stamp of the rows; empty if they are gone."""
    with suppress(ValueError):
        return stamp_of_rows(rows)
    return ""


class _Side:
    """Writes one side, a new shard every `per_shard` samples."""

    def __init__(self, folder: Path, name: str, per_shard: int) -> None:
        self._folder, self._name = folder, name
        self._per_shard = per_shard
        self._numbers = count()
        self._stack = ExitStack()
        self._tar: TarWriter | None = None
        self._keys: set[str] = set()

    def __enter__(self) -> "_Side":
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, reader: SampleReader, shard: Path, number: int) -> None:
        at = next(self._numbers)
        if at % self._per_shard == 0:
            self._stack.close()
            path = self._folder / f"{self._name}-{at // self._per_shard:06d}.tar"
            self._tar = self._stack.enter_context(TarWriter(path))
            self._keys.clear()
        assert self._tar is not None, "the first sample opens a shard"
        record, members = reader.sample(shard, number)
        key = self._unused_key(reader.index(shard).keys[number])
        # where media have a root, their paths hold anywhere
        moved = record if reader.bytes.places.root else _moved(record, shard.parent, self._folder)
        self._tar.add(f"{key}.json", json.dumps(record_to_json(moved), ensure_ascii=False).encode())
        for name, data in members.items():
            self._tar.add(f"{key}.{name}", data)

    def _unused_key(self, key: str) -> str:
        """Return the key, or one with a number behind it: two shards may each have a sample of one key."""
        unused = key
        for copy in count(2):
            if unused not in self._keys:
                break
            unused = f"{key}-{copy}"
        self._keys.add(unused)
        return unused


def _moved(record: Record, before: Path, after: Path) -> Record:
    """Make paths of shared media, which are relative to the shard's folder, relative to the new one."""

    def move(place: Any) -> Any:
        assert isinstance(place, Place)
        if place.path is None or Path(place.path).is_absolute():
            return place
        return replace(place, path=os.path.relpath(before / place.path, after))

    videos = tuple(replace(move(video), frames=tuple(map(move, video.frames))) for video in record.videos)
    return replace(record, images=tuple(map(move, record.images)), videos=videos)

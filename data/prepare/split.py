"""Shards into sides that share no group: patients, documents, trajectories stay together. No torch."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from pathlib import Path
from shutil import rmtree
from typing import Any

from data.format.media import Place
from data.format.record import Record, record_to_json
from data.format.tar import TarWriter
from data.shards.bytes import Places
from data.shards.reader import SampleReader


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """Samples and groups of each side."""

    samples: dict[str, int]
    groups: dict[str, int]
    left_out: int  # unusable samples


def side_of(group: str, shares: Mapping[str, float], seed: int) -> str:
    """The side a group belongs to: by its name and the seed alone, whatever else the corpus holds."""
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
    """Copies every usable sample into `<folder>/<side>/`. `by` is group, or key for samples that stand alone."""
    if by not in ("group", "key"):
        raise ValueError(f"--by is {by!r}; split by group or by key")
    if any(not 0 < share < 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9 or len(shares) < 2:
        raise ValueError(f"shares are {dict(shares)}; write two or more parts that sum to 1")
    taken = [name for name in shares if (folder / name).exists()]
    if taken:
        raise ValueError(f"{folder / taken[0]} exists already; split into an empty folder")
    reader = SampleReader(cache_dir=cache_dir, places=places)
    sides = _sides(shards, shares, by, seed, reader)
    counts = Counter(side for side, _ in sides.values())
    empty = [name for name in shares if not counts[name]]
    if empty:
        groups = len({group for _, group in sides.values()})
        raise ValueError(f"part {empty[0]} gets none of the {groups} groups; change --seed or the shares")
    beside = {name: folder / f".{name}.{os.getpid()}.part" for name in shares}
    try:
        with ExitStack() as stack:
            writers = {name: stack.enter_context(_Side(beside[name], name, samples_per_shard)) for name in shares}
            for (shard, number), (side, _) in sides.items():
                writers[side].add(reader, shard, number)
        for name in shares:
            beside[name].rename(folder / name)
    finally:
        for path in beside.values():
            rmtree(path, ignore_errors=True)  # left only where the split failed: it may be repeated
    groups_of = {name: {group for side, group in sides.values() if side == name} for name in shares}
    total = sum(len(reader.index(shard)) for shard in shards)
    reader.bytes.close()
    return SplitReport(
        samples={name: counts[name] for name in shares},
        groups={name: len(groups) for name, groups in groups_of.items()},
        left_out=total - len(sides),
    )


def _sides(
    shards: Sequence[Path], shares: Mapping[str, float], by: str, seed: int, reader: SampleReader
) -> dict[tuple[Path, int], tuple[str, str]]:
    sides = {}
    for shard in shards:
        index = reader.index(shard)
        for number, key in enumerate(index.keys):
            if number in index.problems:
                continue
            group = reader.record(shard, number).group if by == "group" else key
            if group is None:
                raise ValueError(f"shard {shard.name}, sample {key}: has no group; add one, or split with --by key")
            sides[shard, number] = side_of(group, shares, seed), group
    return sides


class _Side:
    """Writes one side, a new shard every `per_shard` samples."""

    def __init__(self, folder: Path, name: str, per_shard: int) -> None:
        self._folder, self._name = folder, name
        self._per_shard = per_shard
        self._numbers = count()
        self._stack = ExitStack()
        self._tar: TarWriter | None = None

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
        assert self._tar is not None, "the first sample opens a shard"
        record, members = reader.sample(shard, number)
        key = reader.index(shard).keys[number]
        # where media have a root, their paths hold anywhere
        moved = record if reader.bytes.places.root else _moved(record, shard.parent, self._folder)
        self._tar.add(f"{key}.json", json.dumps(record_to_json(moved), ensure_ascii=False).encode())
        for name, data in members.items():
            self._tar.add(f"{key}.{name}", data)


def _moved(record: Record, before: Path, after: Path) -> Record:
    """Paths of shared media, which are relative to the shard's folder, seen from the new one."""

    def move(place: Any) -> Any:
        assert isinstance(place, Place)
        if place.path is None or Path(place.path).is_absolute():
            return place
        return replace(place, path=os.path.relpath(before / place.path, after))

    videos = tuple(replace(move(video), frames=tuple(map(move, video.frames))) for video in record.videos)
    return replace(record, images=tuple(map(move, record.images)), videos=videos)

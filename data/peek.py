"""Looks at the first samples of every source, and counts the packs of an epoch, before anything is loaded. No torch.

A start would find the same later, when all ranks are up. Rows are read as a build reads them, without their pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.format.fields import BadField
from data.format.media import Place
from data.format.record import Record, RecordError, parse_record
from data.format.tar import BLOCK, KeyedMembers, group_members, walk_tar
from data.prepare.convert import REJECTS, convert_row, folder_of_shards, read_rows
from data.prepare.media_place import media_entries
from data.shards.bytes import Places
from data.shards.lengths import Lengths, known_lengths
from data.stream.corpus import Limits, find_shards
from data.stream.plan import Plan, PlanSettings, Units, make_plan

LOOKED_AT = 8
"""Samples of a source that are looked at."""
MOST_SHARDS = 1000
"""Shards whose end is looked at, spread over a source."""
LARGE_JSON = 1 << 26
"""Bytes of a JSON list from which on it is not read: that takes seconds."""
LARGE_ROWS = 1 << 29
"""Bytes of a file of rows from which on its content is not hashed, which is how its shards are found."""
MANY = 500_000
"""Samples from which on no plan is made: it takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Peek:
    """Findings on the first samples of a source."""

    looked_at: int
    refused: tuple[str, ...]
    """Those that could not be used, with reasons."""
    at_least: int
    """Samples of the source, counted up to what was asked for."""


def is_rows(path: str) -> bool:
    """Say whether a source is a file of rows, which is converted into shards."""
    return path.endswith((".jsonl", ".json"))


def peek(path: str, key: str, places: Places, *, enough: int) -> Peek:
    """Look at the first samples, and count up to `enough`. ValueError or OSError for a source that cannot be read."""
    if not is_rows(path):
        return _peek_shards(find_shards(path, key), places, enough)
    source = Path(path)
    if source.suffix == ".json" and source.stat().st_size > LARGE_JSON:
        return Peek(looked_at=0, refused=(), at_least=enough)
    count = max(enough, LOOKED_AT)
    rows = list(islice(read_rows(source), count))
    if not rows:
        raise ValueError("it contains no row")
    refused = []
    for number, row in rows[:LOOKED_AT]:
        try:
            _look_at_row(row, source.parent, places)
        except ValueError as error:
            refused.append(f"row {number}: {_reason(error)}")
    return Peek(looked_at=min(LOOKED_AT, len(rows)), refused=tuple(refused), at_least=len(rows))


def _reason(error: ValueError) -> str:
    return error.reason if isinstance(error, RecordError) else str(error)


def _look_at_row(row: Any, folder: Path, places: Places) -> None:
    """Raise ValueError with the reason for which a build would refuse the row, so far as it shows without pixels."""
    if isinstance(row, ValueError):
        raise row
    raw, _ = convert_row(row)

    def put(place: dict[str, Any], where: str) -> dict[str, Any]:
        return {"member": where} if "bytes" in place else place

    record = parse_record(raw | media_entries(raw, image=put, video=put), shard="", key="")
    if not record.supervised:
        raise BadField("messages", "carry no loss: nothing would be learned")
    _require_media(record, folder, places)


def _require_media(record: Record, folder: Path, places: Places) -> None:
    media: list[tuple[str, Place]] = [(f"images[{at}]", image) for at, image in enumerate(record.images)]
    for at, video in enumerate(record.videos):
        media += [(f"videos[{at}]", place) for place in (video.frames or (video,))]
    for name, place in media:
        if place.path is not None and not places.find(place.path, folder).is_file():
            raise ValueError(f"{name}: the file {places.find(place.path, folder)} does not exist")


def _peek_shards(shards: Sequence[Path], places: Places, enough: int) -> Peek:
    refused: list[str] = []
    looked_at = counted = 0
    for shard, sample in islice(_samples(shards), max(enough, LOOKED_AT)):
        counted += 1
        if looked_at < LOOKED_AT:
            looked_at += 1
            try:
                _look_at_sample(shard, sample, places)
            except ValueError as error:
                refused.append(f"{shard.name}, sample {sample.key}: {_reason(error)}")
    if not counted:
        raise ValueError("its shards contain no sample")
    for shard in shards[:: -(-len(shards) // MOST_SHARDS)]:
        _require_end(shard)
    return Peek(looked_at=looked_at, refused=tuple(refused), at_least=counted)


def _require_end(shard: Path) -> None:
    """Raise ValueError for a tar without its end of two blocks of zeros: it was cut off while it was copied."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        file.seek(max(0, size - 2 * BLOCK))
        end = file.read()
    if size % BLOCK or end.strip(b"\0"):
        raise ValueError(f"{shard} is cut off ({size:,} bytes, without the end of a tar). Copy it again")


def _samples(shards: Sequence[Path]) -> Iterator[tuple[Path, KeyedMembers]]:
    for shard in shards:
        yield from ((shard, sample) for sample in group_members(shard, walk_tar(shard)))


def _look_at_sample(shard: Path, sample: KeyedMembers, places: Places) -> None:
    if "json" not in sample.names:
        raise ValueError(f"has no json member, only {sorted(sample.names)}")
    if sample.too_large:
        raise ValueError(sample.too_large)
    at = sample.names.index("json")
    with shard.open("rb") as file:
        file.seek(sample.offsets[at])
        text = file.read(sample.sizes[at])
    members = [name for name in sample.names if name != "json"]
    record = parse_record(text, shard=shard.name, key=sample.key, members=members)
    _require_media(record, shard.parent, places)


def packs_of_an_epoch(
    config: DataConfig, settings: PlanSettings, places: Places, *, files_fingerprint: str
) -> int | None:
    """The packs that the first epoch fills, where every sample has been counted; None where that is not known yet.

    ValueError where samples do not fit a pack.
    """
    whole = replace(settings, remainder="keep")
    plans = plans_of_epochs(config, whole, places, files_fingerprint=files_fingerprint)
    return None if plans is None else len(plans(0).packs)


def plans_of_epochs(
    config: DataConfig, settings: PlanSettings, places: Places, *, files_fingerprint: str
) -> Callable[[int], Plan] | None:
    """Return a function that plans an epoch by its number; None if the samples have not all been counted yet."""
    cache = Path(config.cache_dir) if config.cache_dir else None
    limits = Limits(tokens=settings.tokens_per_pack, patches=settings.patches_per_pack, overlong=config.overlong)
    units = []
    for name, source in config.sources.items():
        shards = _known_shards(source.path, cache, places, f"data.sources.{name}.path")
        counted = [known_lengths(shard, files_fingerprint, places=places, cache_dir=cache) for shard in shards]
        lengths = [one for one in counted if one is not None]
        if not lengths or len(lengths) < len(counted):
            return None
        fitting = _units(name, lengths, limits)
        if fitting is None:
            return None
        units.append(fitting)
    if sum(map(len, units)) > MANY:
        return None
    return lambda epoch: make_plan(units, settings, epoch=epoch)


def _known_shards(path: str, cache: Path | None, places: Places, key: str) -> Sequence[Path]:
    """The shards of a source, or those that its rows were converted into; none where they are not."""
    if not is_rows(path):
        return find_shards(path, key)
    if Path(path).stat().st_size > LARGE_ROWS:
        return []
    folder = folder_of_shards(Path(path), cache, places)
    return find_shards(str(folder), key) if (folder / REJECTS).is_file() else []


def _units(name: str, lengths: Sequence[Lengths], limits: Limits) -> Units | None:
    """The samples of a source that a plan uses; None where turns would be cut, or nothing is left."""
    tokens, patches = (np.concatenate([getattr(one, kind) for one in lengths]) for kind in ("tokens", "patches"))
    shard = np.repeat(np.arange(len(lengths)), [len(one.text) for one in lengths])
    sample = np.concatenate([np.arange(len(one.text)) for one in lengths])
    usable = np.concatenate([_usable(one) for one in lengths])
    over = usable & ((tokens > limits.tokens) | (patches > limits.patches))
    if over.any() and limits.overlong == "split-turns":
        return None
    if over.any() and (limits.overlong == "error" or not (usable & ~over).any()):
        raise ValueError(
            f"{over.sum():,} of {usable.sum():,} samples of data.sources.{name} do not fit a pack of "
            f"{limits.tokens:,} tokens and {limits.patches:,} patches; the longest has {tokens[over].max():,} tokens "
            f"and {patches[over].max():,} patches"
        )
    rows = np.flatnonzero(usable & ~over)
    if not len(rows):
        return None
    return Units(
        name=name,
        shard=shard[rows],
        sample=sample[rows],
        part=np.zeros_like(rows),
        tokens=tokens[rows],
        patches=patches[rows],
    )


def _usable(lengths: Lengths) -> np.ndarray[Any, np.dtype[np.bool_]]:
    usable = np.ones(len(lengths.text), dtype=np.bool_)
    usable[list(lengths.problems)] = False
    return usable

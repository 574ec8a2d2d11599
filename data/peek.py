"""Looks at the first samples of every source, and counts the packs of an epoch, before anything is loaded. No torch.

A start would find the same later, when all ranks are up. Rows are read as a build reads them, without their pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, SourceConfig
from data.format.fields import BadField
from data.format.media import Place
from data.format.record import Record, RecordError, parse_record
from data.format.tar import BLOCK, KeyedMembers, group_members, walk_tar
from data.prepare.copies import REJECTS, folder_of_shards
from data.prepare.recognise import recognise
from data.rows.archive import inside_zip
from data.rows.columns import Columns
from data.rows.convert import convert_rows
from data.rows.files import is_rows, read_source, row_files, row_source
from data.rows.media import media_entries
from data.rows.pdf import page_of
from data.shards.bytes import ByteReader, Places, places_of
from data.shards.find import find_shards
from data.shards.layout import layout_of, parse_sample
from data.shards.lengths import Lengths, known_lengths
from data.stores.cache import held
from data.stream.corpus import Limits
from data.stream.plan import Plan, PlanSettings, Units, make_plan

LOOKED_AT = 8
"""Samples of a source that are looked at."""
MOST_SHARDS = 1000
"""Shards whose end is looked at, spread over a source."""
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


def peek(source: SourceConfig, key: str, config: DataConfig, *, enough: int) -> Peek:
    """Look at the first samples, and count up to `enough`. ValueError or OSError for a source that cannot be read."""
    places = places_of(config)
    if not is_rows(source.path):
        return _peek_shards(_shards(source, key, config), places, enough)
    rows = row_source(source)
    recognise(rows)
    refused: list[str] = []
    looked_at = counted = 0
    for number, row, origin in islice(read_source(rows), max(enough, LOOKED_AT)):
        counted += 1
        if looked_at < LOOKED_AT:
            looked_at += 1
            try:
                _look_at_row(row, rows.columns, origin, places)
            except ValueError as error:
                refused.append(f"row {number}: {_reason(error)}")
    if not counted:
        raise ValueError("it contains no row")
    return Peek(looked_at=looked_at, refused=tuple(refused), at_least=counted)


def _shards(source: SourceConfig, key: str, config: DataConfig) -> Sequence[Path]:
    cache = Path(config.cache_dir) if config.cache_dir else None
    return find_shards(source.path, key, split=source.split, cache_dir=cache, cache_gb=config.cache_gb)


def _reason(error: ValueError) -> str:
    return error.reason if isinstance(error, RecordError) else str(error)


def _look_at_row(row: Any, columns: Columns, folder: Path, places: Places) -> None:
    """Raise ValueError with the reason for which a build would refuse the row, so far as it shows without pixels."""
    if isinstance(row, ValueError):
        raise row

    def put(place: dict[str, Any], where: str) -> dict[str, Any]:
        return {"member": where} if "bytes" in place or _is_read_by_a_build(place, folder) else place

    for raw in convert_rows(row, columns)[0]:
        record = parse_record(raw | media_entries(raw, image=put, video=put), shard="", key="")
        if not record.supervised:
            raise BadField("messages", "carry no loss: nothing would be learned")
        _require_media(record, folder, places)


def _is_read_by_a_build(place: dict[str, Any], folder: Path) -> bool:
    """Say whether a build makes a member of this place, as it does with a page of a PDF and a member of a zip."""
    return page_of(place, "") is not None or inside_zip(folder / place.get("path", "")) is not None


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
    reader = ByteReader(places)
    layouts: dict[Path, str] = {}
    for shard, sample in islice(_samples(shards), max(enough, LOOKED_AT)):
        counted += 1
        if looked_at < LOOKED_AT:
            looked_at += 1
            try:
                if shard not in layouts:
                    first = list(islice(group_members(shard, walk_tar(shard)), LOOKED_AT))
                    layouts[shard] = layout_of(shard, first, reader)
                _look_at_sample(shard, sample, reader, layouts[shard])
            except ValueError as error:
                refused.append(f"{shard.name}, sample {sample.key}: {_reason(error)}")
    reader.close()
    if not counted:
        raise ValueError("its shards contain no sample")
    for shard in shards[:: -(-len(shards) // MOST_SHARDS)]:
        if shard.exists():  # what a store has is fetched and checked when it is needed
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
        with held(shard):
            yield from ((shard, sample) for sample in group_members(shard, walk_tar(shard)))


def _look_at_sample(shard: Path, sample: KeyedMembers, reader: ByteReader, layout: str) -> None:
    if sample.too_large:
        raise ValueError(sample.too_large)

    def read(name: str) -> bytes:
        at = sample.names.index(name)
        return reader.read(shard, sample.offsets[at], sample.sizes[at])

    record = parse_sample(layout, sample.names, read, shard=shard.name, key=sample.key)
    _require_media(record, shard.parent, reader.places)


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
        shards = _known_shards(source, config, places, f"data.sources.{name}.path")
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


def _known_shards(source: SourceConfig, config: DataConfig, places: Places, key: str) -> Sequence[Path]:
    """The shards of a source, or those that its rows were converted into; none where they are not."""
    if not is_rows(source.path):
        return _shards(source, key, config)
    rows = row_source(source)
    if sum(file.stat().st_size for file in row_files(rows)) > LARGE_ROWS:
        return []
    folder = folder_of_shards(rows, Path(config.cache_dir) if config.cache_dir else None, places)
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

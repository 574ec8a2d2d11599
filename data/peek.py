"""Checks the first samples of every source, and counts the packs of an epoch, before anything is loaded. No torch.

A run would find the same problems later, once all ranks are up. Rows are read as in a build, but without pixels.
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
from data.format.printable import count_of
from data.format.record import Record, RecordError, parse_record
from data.format.tar import BLOCK, KeyedMembers, group_members, walk_tar
from data.prepare.convert import REJECTS, convert_row, folder_of_shards, read_rows
from data.prepare.media_place import media_entries
from data.shards.bytes import Places
from data.shards.lengths import Lengths, known_lengths
from data.stream.corpus import Limits, find_shards
from data.stream.plan import Plan, PlanSettings, Units, make_plan

LOOKED_AT = 8
"""Samples of a source that are checked."""
LARGE_JSON = 1 << 26
"""A JSON list with more bytes is not read, because that takes seconds."""
LARGE_ROWS = 1 << 29
"""A file of rows with more bytes is not hashed, so its converted shards are not looked up."""
MANY = 500_000
"""No plan is made for more samples, because that takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Peek:
    """Findings on the first samples of a source."""

    looked_at: int
    """Samples that were checked."""
    refused: tuple[str, ...]
    """Samples that cannot be used, with reasons."""
    at_least: int
    """Samples of the source; counting stops at the number that the caller needs."""


def is_rows(path: str) -> bool:
    """Return whether a source is a file of rows, which is converted into shards."""
    return path.endswith((".jsonl", ".json"))


def peek(path: str, key: str, places: Places, *, enough: int) -> Peek:
    """Check the first samples, and count up to `enough`. Raise ValueError or OSError for an unreadable source."""
    if not is_rows(path):
        return _peek_shards(find_shards(path, key), places, enough)
    source = Path(path)
    if source.suffix == ".json" and source.stat().st_size > LARGE_JSON:
        return Peek(looked_at=0, refused=(), at_least=enough)
    count = max(enough, LOOKED_AT)
    rows = list(islice(read_rows(source), count))
    if not rows:
        raise ValueError("it contains no rows")
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
    """Raise ValueError if a build would refuse the row, for any reason that can be seen without pixels."""
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
            raise ValueError(f"{name}: {places.find(place.path, folder)} is not a file that exists")


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
        raise ValueError("its shards contain no samples")
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
) -> tuple[int, int] | None:
    """Return the packs and steps of the first epoch, or None if some samples have not been measured yet.

    Raise ValueError if no sample fits in a pack, or if the packs do not fill a step.
    """
    whole = replace(settings, remainder="keep")
    plans = plans_of_epochs(config, whole, places, files_fingerprint=files_fingerprint)
    return None if plans is None else len(plans(0).packs)


def plans_of_epochs(
    config: DataConfig, settings: PlanSettings, places: Places, *, files_fingerprint: str
) -> Callable[[int], Plan] | None:
    """What plans an epoch by its number, where every sample has been counted; None where that is not known yet."""
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
    """Return the shards of a source, or of its converted rows; an empty list if they are not converted yet."""
    if not is_rows(path):
        return find_shards(path, key)
    if Path(path).stat().st_size > LARGE_ROWS:
        return []
    folder = folder_of_shards(Path(path), cache, places)
    return find_shards(str(folder), key) if (folder / REJECTS).is_file() else []


def _units(name: str, lengths: Sequence[Lengths], limits: Limits) -> Units | None:
    """Return the samples of a source that a plan uses; None if some must be split by turns, which needs a tokenizer."""
    tokens, patches = (np.concatenate([getattr(one, kind) for one in lengths]) for kind in ("tokens", "patches"))
    shard = np.repeat(np.arange(len(lengths)), [len(one.text) for one in lengths])
    sample = np.concatenate([np.arange(len(one.text)) for one in lengths])
    usable = np.concatenate([_usable(one) for one in lengths])
    over = usable & ((tokens > limits.tokens) | (patches > limits.patches))
    if over.any() and limits.overlong == "split-turns":
        return None
    if over.any() and (limits.overlong == "error" or not (usable & ~over).any()):
        raise ValueError(
            f"{over.sum():,} of {count_of(int(usable.sum()), 'sample')} of data.sources.{name} cannot fit in a pack of "
            f"{limits.tokens:,} tokens and {limits.patches:,} patches; the largest numbers are {tokens[over].max():,} "
            f"tokens and {patches[over].max():,} patches"
        )
    rows = np.flatnonzero(usable & ~over)
    if not len(rows):
        raise ValueError(f"data.sources.{name} has no usable sample")
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

"""Measures the samples of all sources, as arrays that a plan can use. No torch."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.format.printable import count_of
from data.format.turns import Cut, cut_record, split_turns
from data.shards.bytes import Places
from data.shards.lengths import Lengths, Measure, load_lengths
from data.shards.pool import worker_pool
from data.shards.reader import SampleReader
from data.shards.sidecar import sidecar
from data.stores.ahead import reading_ahead
from data.stream.plan import Units

_PART = 1 << 31

Table = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Unused:
    """A sample that no plan uses, and the reason."""

    source: str
    shard: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The units of all sources, the table of shards that they refer to, and the samples that were left out."""

    sources: tuple[Units, ...]
    shards: tuple[Path, ...]
    places: Places  # of media outside the shards
    digest: str
    unusable: tuple[Unused, ...]  # broken samples
    overlong: tuple[Unused, ...]  # longer than the budget, left out by policy


def encode_part(first: int, last: int) -> int:
    """Encode the first and last message of a part as one number above 0, which stands for the entire sample."""
    return first * _PART + last + 1


def decode_part(part: int) -> tuple[int, int] | None:
    """Return the first and last message of a part, or None for the entire sample."""
    return None if part == 0 else (part // _PART, part % _PART - 1)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Budgets of a pack, and the policy for samples that exceed them."""

    tokens: int
    patches: int
    overlong: Literal["error", "skip", "split-turns"] = "error"


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard of one source with its lengths; `number` is its index in the corpus's table."""

    number: int
    source: str
    path: Path
    lengths: Lengths


def load_corpus(
    sources: Mapping[str, Sequence[Path]],
    measure: Measure,
    limits: Limits,
    *,
    cache_dir: Path | None = None,
    jobs: int = 1,
    section: str = "data",
    places: Places | None = None,
) -> Corpus:
    """Index and measure the shards that are not yet, and apply the policy for samples over the budgets."""
    shards = tuple(shard for paths in sources.values() for shard in paths)
    places = places or Places()
    lengths = measure_all(shards, measure, cache_dir, jobs, places=places)
    reader = SampleReader(cache_dir=cache_dir, places=places)
    digest = blake2b(digest_size=16)
    units: list[Units] = []
    unusable: list[Unused] = []
    overlong: list[Unused] = []
    first = 0
    for name, paths in sources.items():
        tables = [np.zeros((0, 5), dtype=np.int64)]
        for number in range(first, first + len(paths)):
            shard = _Shard(number=number, source=name, path=shards[number], lengths=lengths[number])
            digest.update(repr((name, shard.path.name, shard.lengths.digest)).encode())
            table, too_long = _table(shard, measure, limits, reader)
            tables.append(table)
            overlong += too_long
            unusable += [_unused(shard, sample, why, reader) for sample, why in shard.lengths.problems.items()]
        first += len(paths)
        if not sum(map(len, tables)):
            shown = "; ".join(
                f"sample {item.key}: {item.reason}" for item in (unusable + overlong)[-3:] if item.source == name
            )
            raise ValueError(f"{section}.sources.{name} has no usable sample: {shown or 'its shards are empty'}")
        shard_column, sample, part, tokens, patches = np.concatenate(tables).T
        units.append(Units(name=name, shard=shard_column, sample=sample, part=part, tokens=tokens, patches=patches))
    reader.bytes.close()
    if limits.overlong == "error" and overlong:
        raise ValueError(_too_long(overlong))
    return Corpus(
        sources=tuple(units),
        shards=shards,
        places=places,
        digest=digest.hexdigest(),
        unusable=tuple(unusable),
        overlong=tuple(overlong),
    )


def _too_long(overlong: Sequence[Unused]) -> str:
    shown = "; ".join(f"shard {item.shard}, sample {item.key}: {item.reason}" for item in overlong[:5])
    return (
        f"{count_of(len(overlong), 'sample')} cannot fit in a pack: {shown}{'; ...' if len(overlong) > 5 else ''}. "
        "Raise data.tokens_per_pack (or data.vision_tokens_per_pack), or set data.overlong to skip or split-turns"
    )


def _table(shard: _Shard, measure: Measure, limits: Limits, reader: SampleReader) -> tuple[Table, list[Unused]]:
    """Return rows (shard, sample, part, tokens, patches) in order of samples, and the samples too long for a pack."""
    tokens, patches = shard.lengths.tokens, shard.lengths.patches
    over = (tokens > limits.tokens) | (patches > limits.patches)
    usable = np.ones(len(tokens), dtype=bool)
    usable[list(shard.lengths.problems)] = False
    fitting = np.flatnonzero(usable & ~over)
    columns = (np.full_like(fitting, shard.number), fitting, np.zeros_like(fitting), tokens[fitting], patches[fitting])
    rows = [np.stack(columns, axis=1)]
    overlong: list[Unused] = []
    for sample in np.flatnonzero(usable & over).tolist():
        reason = f"{tokens[sample]} tokens and {patches[sample]} patches, but a pack holds {limits.tokens} and "
        reason += str(limits.patches)
        try:
            if limits.overlong != "split-turns":
                raise ValueError(reason)
            rows.append(_split(shard, sample, measure, limits, reader))
        except ValueError as error:
            overlong.append(_unused(shard, sample, str(error), reader))
    table = np.concatenate(rows)
    return table[np.lexsort((table[:, 2], table[:, 1]))], overlong


def _split(shard: _Shard, sample: int, measure: Measure, limits: Limits, reader: SampleReader) -> Table:
    index = reader.index(shard.path)
    images, videos = index.images(sample), index.videos(sample)

    def count(cut: Cut) -> tuple[int, int]:
        facts = cut.of(images, videos)
        vision = measure.count_vision(cut.record, *facts)
        return measure.count_text(cut.record, *facts) + vision.tokens, vision.patches

    def fits(cut: Cut) -> bool:
        tokens, patches = count(cut)
        return tokens <= limits.tokens and patches <= limits.patches

    record = reader.record(shard.path, sample)
    parts = split_turns(record, fits)
    rows = [(shard.number, sample, encode_part(*part), *count(cut_record(record, *part))) for part in parts]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def _unused(shard: _Shard, sample: int, reason: str, reader: SampleReader) -> Unused:
    key = reader.index(shard.path).keys[sample]
    return Unused(source=shard.source, shard=shard.path.name, key=key, reason=reason)


def measure_all(
    shards: Sequence[Path], measure: Measure, cache_dir: Path | None, jobs: int, *, places: Places
) -> list[Lengths]:
    """Return the lengths of every shard; those already saved next to the shards are reused."""
    count = partial(_measure_one, measure=measure, cache_dir=cache_dir, places=places)
    new = ((at, shard) for at, shard in enumerate(shards) if not sidecar(shard, ".len", cache_dir).exists())
    with ExitStack() as stack:
        pool = stack.enter_context(worker_pool(jobs)) if jobs > 1 else None
        results = map(count, shards) if pool is None else pool.map(count, shards)  # forks before there are threads
        ahead = stack.enter_context(reading_ahead(new))
        lengths = []
        for at, one in enumerate(results, start=1):
            lengths.append(one)
            if ahead is not None:
                ahead.at(at)
        return lengths


def _measure_one(shard: Path, *, measure: Measure, cache_dir: Path | None, places: Places) -> Lengths:
    reader = SampleReader(cache_dir=cache_dir, places=places)
    try:
        return load_lengths(shard, measure, reader=reader, cache_dir=cache_dir)
    finally:
        reader.bytes.close()

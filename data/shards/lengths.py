"""Counts the tokens of each sample, once for a tokenizer and its settings, and keeps them beside the index."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.format.facts import ImageFacts, VideoFacts, VisionCount
from data.format.record import Record
from data.shards.bytes import Places
from data.shards.index import stamp_of
from data.shards.reader import SampleReader
from data.shards.sidecar import read_arrays, sidecar, write_arrays


class Measure(Protocol):
    """Counts the tokens of a record from the facts of its media. The renderer does, without pixels."""

    fingerprint: str
    text_fingerprint: str
    files_fingerprint: str

    def count_text(self, record: Record, images: Sequence[ImageFacts], videos: Sequence[VideoFacts]) -> int: ...  # noqa: D102

    def count_vision(  # noqa: D102  # the renderer documents both
        self, record: Record, images: Sequence[ImageFacts], videos: Sequence[VideoFacts]
    ) -> VisionCount: ...


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts of a shard's samples; `problems` are samples that cannot be used, with reasons."""

    digest: str
    text: np.ndarray[Any, np.dtype[np.int64]]
    vision: np.ndarray[Any, np.dtype[np.int64]]
    patches: np.ndarray[Any, np.dtype[np.int64]]
    problems: dict[int, str]

    @property
    def tokens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The tokens that each sample takes in a row."""
        total: np.ndarray[Any, np.dtype[np.int64]] = self.text + self.vision
        return total


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Lengths with the fingerprints of their renderer; files from older versions lack that of the base's files."""

    text: str
    full: str
    files: str
    lengths: Lengths


def load_lengths(
    shard: Path,
    measure: Measure,
    *,
    reader: SampleReader,
    cache_dir: Path | None,
    tick: Callable[[int], object] = lambda number: None,
) -> Lengths:
    """Load stored lengths if they match index and settings; else count (text only if its settings changed) and store.

    `tick` gets the number of samples counted, after each.
    """
    stamp = stamp_of(shard)
    path = sidecar(shard, reader.bytes.places.beside(shard, ".len"), cache_dir)
    stored = _read(path, stamp, reader.bytes.places.name)
    if stored is not None and stored.full == measure.fingerprint:
        return stored.lengths
    text = stored.lengths.text if stored is not None and stored.text == measure.text_fingerprint else None
    lengths = _count(shard, measure, reader, text, tick)
    places = reader.index(shard).places
    head = [
        stamp,
        places,
        lengths.digest,
        measure.text_fingerprint,
        measure.fingerprint,
        sorted(lengths.problems.items()),
        measure.files_fingerprint,
    ]
    write_arrays(
        path,
        {
            "head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8),
            "text": lengths.text,
            "vision": lengths.vision,
            "patches": lengths.patches,
        },
    )
    return lengths


def known_lengths(shard: Path, files_fingerprint: str, *, places: Places, cache_dir: Path | None) -> Lengths | None:
    """Return the stored lengths of a shard if they were counted with these files and settings, else None."""
    stored = _read(sidecar(shard, places.beside(shard, ".len"), cache_dir), stamp_of(shard), places.name)
    return stored.lengths if stored is not None and stored.files == files_fingerprint else None


def _read(path: Path, stamp: str, places: str) -> _Stored | None:
    arrays = read_arrays(path)
    if arrays is None or set(arrays) != {"head", "text", "vision", "patches"}:
        return None
    stored, of_places, digest, text, full, problems, *files = json.loads(arrays.pop("head").tobytes())
    if stored != stamp or of_places not in ("", places):
        return None
    lengths = Lengths(digest=digest, problems={number: why for number, why in problems}, **arrays)
    return _Stored(text=text, full=full, files="".join(files), lengths=lengths)


def _count(
    shard: Path,
    measure: Measure,
    reader: SampleReader,
    known: np.ndarray[Any, Any] | None,
    tick: Callable[[int], object],
) -> Lengths:
    index = reader.index(shard)
    text, vision, patches = (np.zeros(len(index), dtype=np.int64) for _ in range(3))
    problems = dict(index.problems)
    for number in range(len(index)):
        tick(number)
        if number in index.problems:
            continue
        images, videos = index.images(number), index.videos(number)
        try:
            record = reader.record(shard, number)
            seen = measure.count_vision(record, images, videos)
            vision[number], patches[number] = seen.tokens, seen.patches
            # a sample refused before has no count to keep
            reuse = known is not None and known[number] > 0
            text[number] = known[number] if reuse else measure.count_text(record, images, videos)  # type: ignore[index]
        except ValueError as error:
            problems[number] = str(error)
            text[number] = vision[number] = patches[number] = 0
    return Lengths(digest=index.digest, text=text, vision=vision, patches=patches, problems=problems)

"""Finds samples of an evaluation that training data contains too. Memory is bounded by the evaluation's size."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.prepare.likeness import Hashes, Thumbs, Traits, shard_traits
from data.shards.bytes import Places
from data.shards.pool import worker_pool
from data.shards.reader import SampleReader

Ints = np.ndarray[Any, np.dtype[np.int64]]

TEXT_SHARE = 0.5
"""Share of a sample's word sequences that training must contain for its text to match."""
FRAME_SHARE = 0.5
"""The same for the frames of a video."""
COMMON = 10
"""A sequence in more samples of the evaluation (or in more than 1 % of them) counts as part of a prompt."""
_BITS = 14  # of 63 in which hashes of one picture may differ
_ALIKE = 0.9  # correlation of two small grey copies that show one picture
_BLOCK = 1 << 22  # pairs of hashes that are compared at once

Kind = Literal["text", "image", "video"]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A sample of the evaluation and the sample of the training data that is most like it."""

    kind: Kind
    sample: str  # shard and key in the evaluation
    found_in: str  # shard and key in the training data
    share: float  # of the sample's sequences, images or frames that training contains anywhere


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The samples of an evaluation that training data contains too."""

    samples: int  # of the evaluation that could be compared
    matched: int
    trained: int  # samples of the training data that were read
    unreadable: tuple[str, ...]  # in both, with their reasons
    too_little: int  # of the evaluation: neither enough words nor a picture that shows something
    matches: tuple[Match, ...]


@dataclass(kw_only=True)
class _Table:
    """Sequences or pictures of the evaluation: whose they are, which were found, and where most of a sample was."""

    owners: Ints
    found: np.ndarray[Any, np.dtype[np.bool_]] = field(init=False)
    most: dict[int, tuple[int, str]] = field(default_factory=dict)  # by owner

    def __post_init__(self) -> None:
        self.found = np.zeros(len(self.owners), dtype=bool)

    def note(self, rows: Ints, name: str) -> None:
        """Mark rows as contained in the training sample of this name."""
        if not len(rows):
            return
        self.found[rows] = True
        owners, counts = np.unique(self.owners[rows], return_counts=True)
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            if count > self.most.get(owner, (0, ""))[0]:
                self.most[owner] = (count, name)

    def shares(self) -> Iterator[tuple[int, float, str]]:
        """Yield each owner of which something was found, the share found, and where the most of it was."""
        total = np.bincount(self.owners)
        found = np.bincount(self.owners[self.found], minlength=len(total))
        for owner, (_, name) in sorted(self.most.items()):
            yield owner, float(found[owner] / total[owner]), name


class _Sought:
    """Everything of the evaluation that is looked for."""

    def __init__(self, samples: Sequence[Traits]) -> None:
        sequences, owners = _without_common(samples)
        order = np.argsort(sequences, kind="stable")
        self._sequences, self.text = sequences[order], _Table(owners=owners[order])
        # videos of all samples are numbered through; an image is an owner of its own
        owners_of_pictures: list[int] = []
        self.media: list[tuple[int, Kind]] = []  # sample and kind of each owner
        known: dict[tuple[int, int], int] = {}
        for at, sample in enumerate(samples):
            for number, video in enumerate(sample.pictures.videos):
                key = (at, video) if video >= 0 else (at, -1 - number)
                if key not in known:
                    known[key] = len(self.media)
                    self.media.append((at, "video" if video >= 0 else "image"))
                owners_of_pictures.append(known[key])
        self.pictures = _Table(owners=np.array(owners_of_pictures, dtype=np.int64))
        shown = [sample.pictures for sample in samples if len(sample.pictures.videos)]
        width = max((item.hashes.shape[1] for item in shown), default=1)
        self._hashes: Hashes = np.concatenate(
            [np.zeros((0, width), np.uint64), *(_widen(item.hashes, width) for item in shown)]
        )
        self._thumbs = np.concatenate(
            [np.zeros((0, width, 256), np.float16), *(_widen(item.thumbs.astype(np.float16), width) for item in shown)]
        )
        self.empty = [
            at for at, sample in enumerate(samples) if not len(sample.sequences) and not len(sample.pictures.videos)
        ]

    def look_for(self, sample: Traits, name: str) -> None:
        """Note what this sample of the training data has in common with the evaluation."""
        if len(self._sequences) and len(sample.sequences):
            first = np.searchsorted(self._sequences, sample.sequences, side="left")
            last = np.searchsorted(self._sequences, sample.sequences, side="right")
            hits = [np.arange(low, high) for low, high in zip(first, last, strict=True) if high > low]
            self.text.note(np.concatenate([np.zeros(0, np.int64), *hits]), name)
        for hashes, thumbs in zip(sample.pictures.hashes, sample.pictures.thumbs, strict=True):
            self.pictures.note(self._alike(hashes, thumbs), name)

    def _alike(self, hashes: Hashes, thumbs: Thumbs) -> Ints:
        """Return the pictures that this one shows, or that show a crop of it, or of which it is a crop."""
        crop_of_sought = _near(self._hashes.reshape(-1), hashes[:1])
        rows, windows = np.divmod(crop_of_sought, self._hashes.shape[1])
        alike = rows[self._thumbs[rows, windows].astype(np.float32) @ thumbs[0] >= _ALIKE]
        rows, windows = np.divmod(_near(hashes, self._hashes[:, 0]), len(hashes))
        same = (self._thumbs[rows, 0].astype(np.float32) * thumbs[windows]).sum(axis=1) >= _ALIKE
        found: Ints = np.unique(np.concatenate([alike, rows[same]]))
        return found


def _widen(values: Any, width: int) -> Any:
    """Repeat the first window until there are `width`; a sample of frames alone has one."""
    missing = width - values.shape[1]
    return np.concatenate([values, np.repeat(values[:, :1], missing, axis=1)], axis=1) if missing else values


def _near(left: Hashes, right: Hashes) -> Ints:
    """Return `number of right * len(left) + number of left` for each pair of hashes that differ in few bits."""
    step = max(1, _BLOCK // max(1, len(left)))
    pairs = [
        np.flatnonzero(np.bitwise_count(right[at : at + step, None] ^ left[None]) <= _BITS) + at * len(left)
        for at in range(0, len(right), step)
    ]
    return np.concatenate([np.zeros(0, np.int64), *pairs])


def _without_common(samples: Sequence[Traits]) -> tuple[Hashes, Ints]:
    """Return the sequences of all samples and their owners, without those that many samples share."""
    sequences = np.concatenate([np.zeros(0, np.uint64), *(sample.sequences for sample in samples)])
    owners = np.repeat(np.arange(len(samples)), [len(sample.sequences) for sample in samples])
    _, inverse, counts = np.unique(sequences, return_inverse=True, return_counts=True)
    keep = counts[inverse] <= max(COMMON, len(samples) // 100)
    return sequences[keep], owners[keep]


def find_overlap(
    train: Sequence[Path],
    evaluation: Sequence[Path],
    *,
    jobs: int = 1,
    cache_dir: Path | None = None,
    places: Places | None = None,
    progress: Callable[[int, str], object] = lambda *_: None,
) -> Overlap:
    """Compare every sample of the evaluation with all of the training data, which is read once, shard by shard."""
    read = partial(shard_traits, cache_dir=cache_dir, places=places or Places())
    reader = SampleReader(cache_dir=cache_dir, places=places)
    samples: list[Traits] = []
    names: list[str] = []
    unreadable: list[str] = []
    trained = 0
    for shard, (traits, problems) in zip(evaluation, _each(partial(read, windows=True), evaluation, jobs), strict=True):
        samples += traits
        names += _names(shard, traits, reader)
        unreadable += _reasons(shard, problems, reader)
    sought = _Sought(samples)
    for done, (shard, (traits, problems)) in enumerate(
        zip(train, _each(partial(read, windows=True), train, jobs), strict=True), 1
    ):
        for sample, name in zip(traits, _names(shard, traits, reader), strict=True):
            sought.look_for(sample, name)
        trained += len(traits)
        unreadable += _reasons(shard, problems, reader)
        progress(done, f"{trained:,} samples")
    matches = sorted(_matches(sought, names), key=lambda match: (-match.share, match.sample))
    return Overlap(
        samples=len(samples),
        matched=len({match.sample for match in matches}),
        trained=trained,
        unreadable=tuple(unreadable),
        too_little=len(sought.empty),
        matches=tuple(matches),
    )


def _each(read: Any, shards: Sequence[Path], jobs: int) -> Iterable[Any]:
    if jobs <= 1:
        yield from map(read, shards)
        return
    with worker_pool(jobs) as pool:
        # a few shards ahead: all results at once would need as much memory as the data
        for first in range(0, len(shards), jobs):
            yield from pool.map(read, shards[first : first + jobs])


def _names(shard: Path, traits: Sequence[Traits], reader: SampleReader) -> list[str]:
    index = reader.index(shard)
    return [f"{shard} {index.keys[sample.number]}" for sample in traits]


def _reasons(shard: Path, problems: Mapping[int, str], reader: SampleReader) -> list[str]:
    index = reader.index(shard)
    return [f"{shard} {index.keys[number]}: {reason}" for number, reason in sorted(problems.items())]


def _matches(sought: _Sought, names: Sequence[str]) -> Iterator[Match]:
    for owner, share, where in sought.text.shares():
        if share >= TEXT_SHARE:
            yield Match(kind="text", sample=names[owner], found_in=where, share=share)
    totals = Counter(sought.media)
    media: dict[tuple[int, Kind], list[tuple[float, str]]] = defaultdict(list)
    for owner, share, where in sought.pictures.shares():
        media[sought.media[owner]].append((share, where))
    for (sample, kind), shares in media.items():
        share, where = max(shares)
        if kind == "image":
            share = len(shares) / totals[sample, kind]
        if kind == "image" or share >= FRAME_SHARE:
            yield Match(kind=kind, sample=names[sample], found_in=where, share=share)

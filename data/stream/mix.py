"""Counts by source of an epoch, from its plan and the indexes: tokens, images, seconds of video, repeats."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.format.turns import cut_record
from data.shards.reader import SampleReader
from data.stream.corpus import Corpus, decode_part
from data.stream.plan import Plan, Units


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """One source's part of an epoch. A sample that is read twice counts twice in all but `distinct`."""

    name: str
    available: int  # samples of the source, or parts of them
    samples: int
    distinct: int
    tokens: int
    vision_tokens: int
    images: int
    videos: int
    seconds: float  # of video
    most_repeats: int  # how often the most frequent sample is read


def epoch_shares(corpus: Corpus, plan: Plan, *, patches_per_token: int, cache_dir: Path | None) -> list[SourceShare]:
    """Return what each source gives to the steps of the planned epoch."""
    reader = SampleReader(cache_dir=cache_dir, places=corpus.places)
    used = np.bincount(plan.packs.members, minlength=sum(map(len, corpus.sources)))
    shares = []
    first = 0
    for units in corpus.sources:
        times = used[first : first + len(units)]
        images, videos, seconds = _media(units, corpus, reader) @ times
        shares.append(
            SourceShare(
                name=units.name,
                available=len(units),
                samples=int(times.sum()),
                distinct=int(np.count_nonzero(times)),
                tokens=int(times @ units.tokens),
                vision_tokens=int(times @ units.patches) // patches_per_token,
                images=int(images),
                videos=int(videos),
                seconds=float(seconds),
                most_repeats=int(times.max(initial=0)),
            )
        )
        first += len(units)
    reader.bytes.close()
    return shares


def _media(units: Units, corpus: Corpus, reader: SampleReader) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the images, the videos and the seconds of video of each unit, [3, units]."""
    media = np.zeros((3, len(units)))
    rows = defaultdict(list)
    for row, shard in enumerate(units.shard.tolist()):
        rows[shard].append(row)
    for shard, members in rows.items():
        index = reader.index(corpus.shards[shard])
        samples = units.sample[members]
        until = np.concatenate([[0.0], np.cumsum(index.video_table[:, 3])])[index.video_starts]
        for at, ends in enumerate((index.image_starts, index.video_starts, until)):
            media[at, members] = np.diff(ends)[samples]
        for row in members:
            if (part := decode_part(int(units.part[row]))) is not None:
                number = int(units.sample[row])
                cut = cut_record(reader.record(corpus.shards[shard], number), *part)
                seconds = sum(index.videos(number)[video].duration for video in cut.videos)
                media[:, row] = len(cut.images), len(cut.videos), seconds
    return media

"""Histograms of tokens, image sizes and video lengths, made from indexes alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.format.printable import count_of
from data.shards.bytes import Places
from data.shards.lengths import Measure, load_lengths
from data.shards.reader import SampleReader
from data.stream.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges, with an open last bin, and exact quantiles of the values."""

    name: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    median: float
    p99: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of a set of shards."""

    samples: int
    unusable: int
    images: int
    videos: int
    histograms: tuple[Histogram, ...]
    context: int
    above_context: float  # share of usable samples with more tokens than `context`
    tokens_above_context: float  # share of tokens in such samples


def histogram(name: str, unit: str, values: np.ndarray[Any, Any], first: float) -> Histogram:
    """Return a histogram with bins that double from `first`."""
    largest = float(values.max()) if len(values) else 0.0
    edges = [0.0, first]
    while edges[-1] <= largest:
        edges.append(edges[-1] * 2)
    counts = np.histogram(values, bins=edges)[0] if len(values) else np.zeros(1, dtype=int)
    middle, high = np.quantile(values, [0.5, 0.99]).tolist() if len(values) else (0.0, 0.0)
    return Histogram(
        name=name,
        unit=unit,
        edges=tuple(edges),
        counts=tuple(counts.tolist()),
        total=float(values.sum()),
        median=middle,
        p99=high,
        largest=largest,
    )


def corpus_lines(corpus: Corpus, *, patches_per_token: int) -> list[str]:
    """Describe each source of a run: its tokens, and those of its images and videos under the present limits."""
    lines = []
    for units in corpus.sources:
        tokens = histogram("", "tokens", units.tokens, 64)
        lines.append(
            f"source {units.name}: {count_of(len(units), 'sample')}, {tokens.total:,.0f} tokens (median "
            f"{tokens.median:,.0f}, 99 % below {tokens.p99:,.0f}, longest {tokens.largest:,.0f})"
        )
        seeing = units.patches[units.patches > 0] // patches_per_token
        if len(seeing):
            vision = histogram("", "tokens", seeing, 64)
            bins = zip(vision.edges, vision.edges[1:], vision.counts, strict=False)
            shown = ", ".join(f"{low:,.0f} to {high:,.0f}: {count:,}" for low, high, count in bins if count)
            lines.append(f"  vision tokens of its {count_of(len(seeing), 'sample')} with images or videos: {shown}")
    return lines


def shard_stats(
    shards: Sequence[Path],
    measure: Measure,
    *,
    context: int,
    cache_dir: Path | None = None,
    places: Places | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Stats:
    """Return the statistics of these shards; `progress` gets the numbers of shards and samples done.

    Shards that are not indexed and measured yet are.
    """
    reader = SampleReader(cache_dir=cache_dir, places=places)
    tokens: list[np.ndarray[Any, Any]] = []
    vision: list[np.ndarray[Any, Any]] = []
    pixels: list[np.ndarray[Any, Any]] = []
    seconds: list[np.ndarray[Any, Any]] = []
    samples = unusable = images = videos = 0
    for done, shard in enumerate(shards):

        def tick(number: int, done: int = done, before: int = samples) -> None:
            progress(done, before + number)

        lengths = load_lengths(shard, measure, reader=reader, cache_dir=cache_dir, tick=tick)
        index = reader.index(shard)
        usable = np.ones(len(index), dtype=bool)
        usable[list(lengths.problems)] = False
        tokens.append(lengths.tokens[usable])
        vision.append(lengths.vision[usable])
        pixels.append(index.image_sizes.astype(np.int64).prod(axis=1) / 1e6)
        seconds.append(index.video_table[:, 3])
        samples += len(index)
        unusable += len(lengths.problems)
        images += len(index.image_sizes)
        videos += len(index.video_table)
        progress(done + 1, samples)
    all_tokens = np.concatenate([np.zeros(0), *tokens])
    above = all_tokens > context
    return Stats(
        samples=samples,
        unusable=unusable,
        images=images,
        videos=videos,
        histograms=(
            histogram("tokens of a sample", "tokens", all_tokens, 64),
            histogram("tokens of its images and videos", "tokens", np.concatenate([np.zeros(0), *vision]), 64),
            histogram("size of an image", "megapixels", np.concatenate([np.zeros(0), *pixels]), 1 / 16),
            histogram("length of a video", "seconds", np.concatenate([np.zeros(0), *seconds]), 1),
        ),
        context=context,
        above_context=float(above.mean()) if len(above) else 0.0,
        tokens_above_context=float(all_tokens[above].sum() / all_tokens.sum()) if len(above) else 0.0,
    )

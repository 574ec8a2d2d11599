"""Measure how much faster two workers of a stream are than one, once both are up: a part of `data-throughput`."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.figure import Figure, Peer, ratio_at_least
from benchmarks.harness.measure import OutputsDiffer, spread
from data.config import DataConfig, SourceConfig
from data.open import open_corpus, open_stream
from data.render.sample import Renderer
from data.stream.corpus import Corpus

ROUNDS = 5
STARTING = 4  # first steps are not counted: workers start, and the first packs are prefetched
SCALES = ratio_at_least(1.7)


def two_workers_beside_one(renderer: Renderer, shard: Path) -> Iterator[Figure]:
    """Yield the milliseconds per pack of a stream with two workers, compared with one worker."""
    configs = {
        workers: DataConfig(
            packs_per_step=1,
            tokens_per_pack=8192,
            workers=workers,
            prefetch=1,
            sources={"photos": SourceConfig(path=str(shard))},
        )
        for workers in (1, 2)
    }
    corpus = open_corpus(configs[1], renderer)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    keys = set()
    for at in range(ROUNDS):
        for workers in (1, 2) if at % 2 else (2, 1):
            read, took = _read(configs[workers], corpus, renderer)
            keys.add(read)
            seconds[workers].append(took)
    if len(keys) != 1:
        raise OutputsDiffer("one worker and two workers give different packs")
    yield Figure(
        "images, two workers beside one",
        1e3 * statistics.median(seconds[2]),
        "ms a pack",
        config={"tokens_per_pack": 8192, "prefetch": 1, "steps not counted": STARTING, "statistic": "median"},
        n=ROUNDS,
        spread={"ours": spread(tuple(seconds[2])), "peer": spread(tuple(seconds[1]))},
        peer=Peer("one worker", 1e3 * statistics.median(seconds[1])),
        target=SCALES,
    )


def _read(config: DataConfig, corpus: Corpus, renderer: Renderer) -> tuple[tuple[str, ...], float]:
    """Return the samples of an epoch in order, and the mean seconds of its later steps."""
    stream = open_stream(config, corpus, renderer, seed=0, rank=0, size=1)
    assert stream.plan.steps > 2 * STARTING
    keys = list[str]()
    for number, step in enumerate(stream):
        if number == STARTING:
            began = time.perf_counter()
        keys += [key for batch in step.batches for key in batch.keys]
    return tuple(keys), (time.perf_counter() - began) / (stream.plan.steps - STARTING - 1)

"""Opens the sources of the `data:` section: finds or converts them, indexes and measures them, plans, and reads."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.checks import data_problems
from data.config import DataConfig, SourceConfig
from data.format.printable import count_of
from data.prepare.converted import shards_of_rows
from data.render.sample import Renderer
from data.rows.files import is_rows, row_source
from data.shards.bytes import places_of
from data.shards.find import find_shards
from data.stream.corpus import Corpus, Limits, load_corpus
from data.stream.plan import plan_settings
from data.stream.stream import DataStream, StreamSettings

log = logging.getLogger(__name__)


def find_sources(config: DataConfig, *, jobs: int = 1, section: str = "data") -> Mapping[str, Sequence[Path]]:
    """Return the shards of every source; rows are converted the first time.

    Errors name the keys of `section`.
    """

    def find(name: str, source: SourceConfig) -> Sequence[Path]:
        key, cache = f"{section}.sources.{name}.path", _cache(config)
        if not is_rows(source.path):
            return find_shards(source.path, key, split=source.split, cache_dir=cache, cache_gb=config.cache_gb)
        limit = config.max_bad_samples
        rows = row_source(source)
        return shards_of_rows(rows, key, cache_dir=cache, jobs=jobs, limit=limit, places=places_of(config))

    return {name: find(name, source) for name, source in config.sources.items()}


def open_corpus(config: DataConfig, renderer: Renderer, *, jobs: int = 1, section: str = "data") -> Corpus:
    """Index and measure all sources. The first caller does the work, so let one rank per node go first."""
    if problems := data_problems(config):
        raise ValueError("\n".join(map(str, problems)))
    settings = plan_settings(config, seed=0)
    limits = Limits(tokens=settings.tokens_per_pack, patches=settings.patches_per_pack, overlong=config.overlong)
    sources = find_sources(config, jobs=jobs, section=section)
    corpus = load_corpus(
        sources,
        renderer,
        limits,
        cache_dir=_cache(config),
        jobs=jobs,
        section=section,
        places=places_of(config),
    )
    shown = [f"source {item.source}, shard {item.shard}, sample {item.key}: {item.reason}" for item in corpus.unusable]
    if len(shown) > config.max_bad_samples:
        raise ValueError(
            f"{count_of(len(shown), 'sample')} cannot be used, but data.max_bad_samples is {config.max_bad_samples}: "
            f"{'; '.join(shown[:5])}; ... Run: moetune shards check"
        )
    for line in shown:
        log.warning("left out: %s", line)
    if corpus.overlong:
        log.warning("data.overlong=%s left out %s", config.overlong, count_of(len(corpus.overlong), "sample"))
    return corpus


def open_stream(
    config: DataConfig, corpus: Corpus, renderer: Renderer, *, seed: int, rank: int, size: int
) -> DataStream:
    """Open the stream of steps for one data rank out of `size`."""
    settings = StreamSettings(
        workers=config.workers,
        prefetch=config.prefetch,
        pad_multiple=config.pad_multiple,
        max_bad_samples=config.max_bad_samples,
        stall_seconds=config.stall_seconds,
        cache_dir=_cache(config),
    )
    return DataStream(corpus, renderer, plan_settings(config, seed=seed), settings, data_rank=rank, data_size=size)


def _cache(config: DataConfig) -> Path | None:
    return Path(config.cache_dir) if config.cache_dir else None

"""The record of a start: its steps, its ranks and versions, and the size and licences of its sources."""

import platform
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from data.shards.bytes import places_of
from data.shards.reader import SampleReader
from data.stream.corpus import Corpus
from data.stream.licences import source_licences
from finetune.config import RunConfig
from finetune.ranks.versions import TESTED, installed_versions


def start_record(
    config: RunConfig, corpora: Iterable[Corpus], *, done: int, ranks: int, device: torch.device
) -> dict[str, Any]:
    """Return the record of one start, after `done` steps; reads a few records of each source."""
    versions = {"python": platform.python_version(), **installed_versions(["moetune", *TESTED])}
    return {
        "step": done,
        "time": datetime.now().isoformat(timespec="seconds"),
        "steps": config.schedule.steps,
        "ranks": ranks,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": versions,
        "sources": _sources(config, corpora),
    }


def _sources(config: RunConfig, corpora: Iterable[Corpus]) -> dict[str, Any]:
    reader = SampleReader(
        cache_dir=Path(config.data.cache_dir) if config.data.cache_dir else None, places=places_of(config.data)
    )
    found: dict[str, Any] = {}
    for corpus in corpora:
        licences = source_licences(corpus, reader)
        for units in corpus.sources:
            sizes = {"samples": len(units), "tokens": int(units.tokens.sum()), "licences": licences[units.name]}
            found.setdefault(units.name, sizes)
    reader.bytes.close()
    return found

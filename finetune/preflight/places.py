"""Paths of a recipe that are not on this machine. Loads nothing: `moetune check` asks for it too."""

import os
from collections.abc import Iterator
from pathlib import Path

from finetune.config import RunConfig
from finetune.files.hub import may_be_hub_id
from finetune.settings.problems import Problem, problem

PATTERN = "*?[{"
"""Marks of a pattern, which may match nothing yet."""
SOURCES = "Name a folder of shards, a .tar, a pattern, or rows (docs/data-format.md lists their forms)"
_MODEL = "Name the folder of a Qwen3-VL base, or a hub id (owner/name)"


def missing_paths(config: RunConfig) -> Iterator[Problem]:
    """Yield every path that names nothing here; a model that may be a hub id is none."""
    for section, sources in (("data", config.data.sources), ("eval", config.eval.sources)):
        for name, source in sources.items():
            if not any(mark in source.path for mark in PATTERN) and "://" not in source.path:
                yield from _missing(f"{section}.sources.{name}.path", source.path, SOURCES)
    if not may_be_hub_id(config.model.path):
        yield from _missing("model.path", str(Path(config.model.path).expanduser()), _MODEL)
    yield from _missing("adapters.start_from", config.adapters.start_from, "Name the folder of an adapter")
    yield from _missing("data.media_root", config.data.media_root, "Name the folder where paths of media start")
    if config.checkpoint.resume not in ("auto", "never"):
        remedy = "Name a step-* folder, or set checkpoint.resume to auto or never"
        yield from _missing("checkpoint.resume", config.checkpoint.resume, remedy)


def _missing(key: str, path: str, remedy: str) -> Iterator[Problem]:
    if path and not os.path.lexists(path):
        here = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
        yield problem(key, path, f"there is no such file or folder{here}", remedy)

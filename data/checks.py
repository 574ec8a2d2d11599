"""Problems of a configuration as values, and the checks of the `data:` section by itself. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from data.config import DataConfig
from data.format.fields import redact
from data.rows.columns import Columns

_LEAST = {
    "packs_per_step": 1,
    "tokens_per_pack": 1,
    "vision_tokens_per_pack": 1,
    "balance_steps": 0,
    "pad_multiple": 1,
    "workers": 0,
    "prefetch": 1,
    "max_bad_samples": 0,
    "stall_seconds": 0,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: the dotted key, the value found, what is allowed, what to do, and where the value was set."""

    key: str
    found: Any
    allowed: str
    remedy: str
    source: str = ""
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        origin = f" ({self.source})" if self.source else ""
        return f"{self.key} = {self.found!r}{origin}: {self.allowed}. {self.remedy}."


def data_problems(config: DataConfig) -> list[Problem]:
    """Return all problems of the section."""
    return [*_out_of_range(config), *_source_problems(config)]


def _out_of_range(config: DataConfig) -> Iterator[Problem]:
    for name, least in _LEAST.items():
        key, value = f"data.{name}", getattr(config, name)
        if value is not None and not value >= least:
            allowed = f"it must be at least {least}"
            yield Problem(key=key, found=value, allowed=allowed, remedy=f"Set {key}={least} or more")


def _source_problems(config: DataConfig) -> Iterator[Problem]:
    if not config.sources:
        remedy = "Add data.sources.<name>.path=... (shards or a JSONL file)"
        yield Problem(key="data.sources", found={}, allowed="there is nothing to train on", remedy=remedy)
    if not config.cache_gb > 0:
        allowed = "it must be above 0"
        yield Problem(key="data.cache_gb", found=config.cache_gb, allowed=allowed, remedy="Set a number of gigabytes")
    for name, source in config.sources.items():
        try:
            Columns.of(source.map)
        except ValueError as error:
            remedy = "docs/data-format.md lists the columns of every shape"
            yield Problem(key=f"data.sources.{name}.map", found=source.map, allowed=f"it {error}", remedy=remedy)
        yield from _budget_problems(name, source.max_tokens, config.mixture)
        yield from _secret_problems(f"data.sources.{name}.path", source.path)
        if source.map and "://" in source.path and source.path.endswith(".txt"):
            allowed = "it has no effect on shards that a .txt file lists, as their names do not say where they belong"
            remedy = "Name the shards by a folder or a pattern, or remove the map"
            yield Problem(key=f"data.sources.{name}.map", found=source.map, allowed=allowed, remedy=remedy)
        key, weight = f"data.sources.{name}.weight", source.weight
        if not (isfinite(weight) and weight > 0):
            allowed = "it must be a finite number above 0"
            yield Problem(key=key, found=weight, allowed=allowed, remedy=f"Set another {key}")
        elif config.mixture == "natural" and weight != 1:
            allowed = "it has no effect with data.mixture=natural, which reads every sample once per epoch"
            remedy = "Set data.mixture to tokens or samples, or remove the weight"
            yield Problem(key=key, found=weight, allowed=allowed, remedy=remedy)


def _budget_problems(name: str, tokens: int | None, mixture: str) -> Iterator[Problem]:
    key = f"data.sources.{name}.max_tokens"
    if tokens is not None and tokens < 1:
        yield Problem(key=key, found=tokens, allowed="it must be at least 1", remedy=f"Set {key}=1 or more, or null")
    elif tokens is not None and mixture == "samples":
        allowed = "it counts tokens, and data.mixture=samples draws samples whatever their length"
        yield Problem(key=key, found=tokens, allowed=allowed, remedy="Set data.mixture to natural or tokens")


def _secret_problems(key: str, path: str) -> Iterator[Problem]:
    """Yield a url that holds a secret: a recipe is written into logs, checkpoints and cards."""
    has_query = path.startswith(("http://", "https://")) and "?" in path
    if "://" in path and (has_query or redact(path) != path):
        allowed = "a url in a recipe must not hold a user, a password or a query, as recipes are logged"
        remedy = "Use the driver's usual places for credentials, or list signed urls in a .txt file of the store"
        yield Problem(key=key, found=redact(path), allowed=allowed, remedy=remedy)

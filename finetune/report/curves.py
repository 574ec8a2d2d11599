"""The curves of a run: its figures by step, with the steps of a long run put together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.config import RunConfig
from finetune.report.files import Record, RunFiles
from finetune.settings.recipes import load_recipe
from finetune.settings.schedule import learning_rate
from finetune.settings.stages import Stage, run_stages, stage_of

Values = np.ndarray[Any, np.dtype[np.float64]]

FIGURES = (
    "loss",
    "loss_balance",
    "loss_z",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "seconds",
    "seconds_data",
    "memory_gb",
    "tokens_nonpad",
    "expert_load_max_over_mean",
    "expert_load_entropy",
    "experts_dead",
    "router_agreement",
)
"""The figures of a step that become curves, by their names in metrics.jsonl."""
BANDS = ("loss", "loss_balance", "grad_norm", "tokens_per_second")
"""Figures of which a long run also shows the lowest and the highest value of the steps put together."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Successive steps that share a point of each curve: `starts` are their first indices among the records."""

    starts: Sequence[int]
    count: int
    width: int

    def mean(self, values: Values, weights: Values | None = None) -> Values:
        """Return the mean of each bucket over the values that are known, weighted if weights are given."""
        weights = np.where(np.isnan(values), 0.0, 1.0 if weights is None else weights)
        sums = np.add.reduceat(np.nan_to_num(values) * weights, self.starts)
        totals = np.add.reduceat(weights, self.starts)
        means: Values = np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)
        return means

    def extremes(self, values: Values) -> tuple[Values, Values]:
        """Return the lowest and the highest value of each bucket."""
        return np.fmin.reduceat(values, self.starts), np.fmax.reduceat(values, self.starts)


def buckets_of(count: int, points: int) -> Buckets:
    """Return the buckets of `count` records for at most `points` points."""
    width = max(1, -(-count // points))
    return Buckets(starts=range(0, count, width), count=count, width=width)


def curves(files: RunFiles, *, points: int) -> dict[str, Any]:
    """Return the curves of a run for the page: x, and by name the values of each point."""
    metrics = files.metrics
    if not metrics:
        return {"x": [], "width": 1, "figures": {}, "bands": {}, "sources": {}, "rates": {}, "stages": []}
    buckets = buckets_of(len(metrics), points)
    steps = [int(metrics[start]["step"]) for start in buckets.starts]
    columns = {name: column(metrics, name) for name in FIGURES}
    known = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    bands = {name: buckets.extremes(known[name]) for name in BANDS if name in known and buckets.width > 1}
    plan = plan_of(files)
    return {
        "x": steps,
        "width": buckets.width,
        "figures": {name: short(buckets.mean(values)) for name, values in known.items()},
        "bands": {name: [short(low), short(high)] for name, (low, high) in bands.items()},
        "sources": dict(_source_curves(metrics, buckets)),
        "rates": rates(*plan, steps) if plan else {},
        "stages": [[stage.name, stage.first] for stage in plan[1] if stage.number] if plan else [],
    }


def column(records: Sequence[Record], name: str) -> Values:
    """Return a figure of each record; NaN where it is unknown."""
    return np.array([number(record.get(name)) for record in records], dtype=np.float64)


def number(value: object) -> float:
    """Return a value as a number; NaN if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def short(values: Values) -> list[float | None]:
    """Return numbers with five digits for the page, which takes half of the bytes; None where one is unknown."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]


def source_names(metrics: Sequence[Record]) -> list[str]:
    """Return the names of all training sources of these steps."""
    return sorted({name for step in metrics if isinstance(step.get("sources"), dict) for name in step["sources"]})


def source_columns(metrics: Sequence[Record], name: str) -> Mapping[str, Values]:
    """Return the figures of one source in each step; 0 or NaN where it has no samples."""
    parts = [step["sources"].get(name) if isinstance(step.get("sources"), dict) else None for step in metrics]
    own = [part if isinstance(part, dict) else {} for part in parts]
    return {
        "loss": column(own, "loss"),
        **{key: np.nan_to_num(column(own, key)) for key in ("weight", "tokens", "samples")},
    }


def _source_curves(metrics: Sequence[Record], buckets: Buckets) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mean loss of each source, weighted as in training, and its share of the useful tokens."""
    useful = np.add.reduceat(np.nan_to_num(column(metrics, "tokens_nonpad")), buckets.starts)
    for name in source_names(metrics):
        own = source_columns(metrics, name)
        tokens = np.add.reduceat(own["tokens"], buckets.starts)
        share = np.divide(tokens, useful, out=np.zeros(len(useful)), where=useful > 0)
        yield name, {"loss": short(buckets.mean(own["loss"], own["weight"])), "share": short(share)}


def plan_of(files: RunFiles) -> tuple[RunConfig, Sequence[Stage]] | None:
    """Return a run's configuration and its stages; None if they cannot be read, as those of another release."""
    path = files.folder / "config.yaml"
    if not path.is_file() or not files.steps:
        return None
    try:
        config, _ = load_recipe(str(path.absolute()))
        config = replace(config, schedule=replace(config.schedule, steps=files.steps, epochs=0.0))
        return config, run_stages(config)
    except (ValueError, OSError):
        return None


def rates(config: RunConfig, stages: Sequence[Stage], steps: Sequence[int]) -> dict[str, list[float | None]]:
    """Return the learning rate of each part that trains, at these steps; 0 where a stage pauses it."""
    at = [(step, stage_of(stages, step)) for step in steps]
    return {
        part: short(
            np.array(
                [
                    learning_rate(step, peak=stage.peaks.get(part, 0.0), schedule=config.schedule, stage=stage)
                    for step, stage in at
                ]
            )
        )
        for part in dict.fromkeys(part for stage in stages for part in stage.peaks)
    }

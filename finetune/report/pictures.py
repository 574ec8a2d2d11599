"""PNG files of a run's curves and of its experts' load, for papers; drawn by matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.format.printable import one_line
from finetune.report.curves import Buckets, buckets_of, column, source_columns, source_names
from finetune.report.files import RunFiles
from finetune.report.load import total_counts

POINTS = 400
DPI = 200
SIZE = (6.4, 3.6)
"""Inches: two pictures beside each other fill a page."""


def require_matplotlib() -> None:
    """Raise ValueError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("the pictures are drawn by matplotlib, which is not installed: pip install 'moetune[report]'")


def write_pictures(files: RunFiles, folder: Path) -> list[Path]:
    """Write the pictures that a run has records for, and return their paths."""
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {**_curve_drawings(files), **_evaluation_drawings(files), **_load_drawing(files)}
    return [_drawn(folder / f"{name}.png", draw) for name, draw in drawings.items()]


def _drawn(path: Path, draw: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    figure.savefig(path, metadata={"Software": None})
    return path


def _curve_drawings(files: RunFiles) -> dict[str, Callable[[Any], None]]:
    buckets = buckets_of(len(files.metrics), POINTS)
    if not files.metrics:
        return {}
    steps = [record["step"] for record in (files.metrics[start] for start in buckets.starts)]
    titles = {
        "loss": "training loss",
        "grad_norm": "gradient norm",
        "loss_balance": "balance loss",
        "tokens_per_second": "useful tokens per second",
        "expert_load_max_over_mean": "busiest expert over the mean",
    }
    drawings = {
        name: _curves(steps, {title: buckets.mean(values)}, title)
        for name, title in titles.items()
        if not np.isnan(values := column(files.metrics, name)).all()
    }
    by_source = {name: _source_loss(files, name, buckets) for name in source_names(files.metrics)}
    return {
        **drawings,
        **({"loss_by_source": _curves(steps, by_source, "training loss")} if len(by_source) > 1 else {}),
    }


def _source_loss(files: RunFiles, name: str, buckets: Buckets) -> Any:
    own = source_columns(files.metrics, name)
    return buckets.mean(own["loss"], own["weight"])


def _evaluation_drawings(files: RunFiles) -> dict[str, Callable[[Any], None]]:
    steps = [record["step"] for record in files.evaluations]
    drawings = {}
    for quantity, title in (("loss", "held-out loss"), ("accuracy", "held-out accuracy"), ("kl", "KL from the base")):
        names = dict.fromkeys(key for record in files.evaluations for key in record if key.endswith(f"/{quantity}"))
        values = {name.rpartition("/")[0]: column(files.evaluations, name) for name in names}
        if values:
            drawings[f"evaluation_{quantity}"] = _curves(steps, values, title, marker="o")
    return drawings


def _curves(steps: Sequence[int], values: Mapping[str, Any], title: str, *, marker: str = "") -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for name, points in values.items():
            axes.plot(steps, points, label=_plain(name), linewidth=1.2, marker=marker, markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if len(values) > 1:
            axes.legend(frameon=False)

    return draw


def _load_drawing(files: RunFiles) -> dict[str, Callable[[Any], None]]:
    counts = total_counts(files)
    if counts is None:
        return {}

    def draw(axes: Any) -> None:
        shares = counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)
        image = axes.imshow(shares, aspect="auto", interpolation="nearest", vmin=0, vmax=max(2.0, float(shares.max())))
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.figure.colorbar(image, label="load, times an even share")

    return {"expert_load": draw}


def _plain(name: str) -> str:
    """Return a name as matplotlib shows it: a dollar would begin a formula, and a leading _ would hide the name."""
    shown = one_line(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown

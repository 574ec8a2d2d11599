"""Checks `data.image:`, `data.video:` and the name, folder and seed of the run. Loads no torch."""

from collections.abc import Iterator
from math import isfinite
from pathlib import PurePosixPath

from finetune.config import RunConfig
from finetune.settings.problems import Problem, problem

_SEEDS = 2**63
_PAIRS = (("data.image", "tokens"), ("data.video", "tokens"), ("data.video", "frames"))


def media_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield sizes and rates that no image or video can have; unset values are the base's own, which are known later."""
    video = config.data.video
    sizes: dict[str, float | None] = {"data.video.max_tokens_per_frame": video.max_tokens_per_frame}
    for section, unit in _PAIRS:
        values = config.data.image if section == "data.image" else video
        low, high = (getattr(values, f"{end}_{unit}") for end in ("min", "max"))
        sizes |= {f"{section}.min_{unit}": low, f"{section}.max_{unit}": high}
        if low is not None and high is not None and low > high >= 1:
            allowed = f"it must not be above {section}.max_{unit}, {high}"
            yield problem(f"{section}.min_{unit}", low, allowed, f"Lower it, or raise {section}.max_{unit}")
    for key, value in sizes.items():
        if value is not None and value < 1:
            yield problem(key, value, "it must be at least 1", f"Set {key}=1 or more")
    for key, value in {"fps": video.fps, "timeout_seconds": video.timeout_seconds}.items():
        if not (isfinite(value) and value > 0):
            yield problem(
                f"data.video.{key}", value, "it must be a finite number above 0", f"Set another data.video.{key}"
            )


def run_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield names that the folder of a run cannot have, and a seed that random generators do not accept."""
    name = PurePosixPath(config.run.name)
    if not config.run.name.isprintable():
        allowed = "it must be one line of printable characters"
        yield problem("run.name", config.run.name, allowed, "Choose a name, such as charts-2")
    if name.is_absolute() or ".." in name.parts or not name.parts:
        allowed = f"it must name a folder below run.folder, {config.run.folder}"
        yield problem("run.name", config.run.name, allowed, "Choose a name, such as charts-2")
    if not config.run.folder.isprintable():
        allowed = "it must be one line of printable characters"
        yield problem("run.folder", config.run.folder, allowed, "Name a folder, such as /scratch/runs")
    if config.run.seed >= _SEEDS:
        allowed = f"it must be below {_SEEDS}, the limit of random generators"
        yield problem("run.seed", config.run.seed, allowed, "Set a smaller run.seed")

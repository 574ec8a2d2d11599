"""The configuration of a run as this machine will run it, and the folder of the run."""

from collections.abc import Sequence
from pathlib import Path

from finetune.checkpoint.folder import starting_point
from finetune.config import RunConfig
from finetune.planner.foresight import resolve_auto_here
from finetune.settings.checks import require
from finetune.settings.problems import Problem
from finetune.settings.recipes import load_recipe


def read_run(name: str, overrides: Sequence[str], *, ranks: int) -> tuple[RunConfig, Path, Sequence[Problem]]:
    """Return a run's configuration, without any `auto` for this machine, its folder, and warnings; raise on errors."""
    config, problems = load_recipe(name, overrides)
    folder = config.run.path
    config = config if any(problem.level == "error" for problem in problems) else resolve_auto_here(config, ranks=ranks)
    resuming = starting_point(folder / "checkpoints", config.checkpoint.resume) is not None
    return config, folder, require(config, problems, ranks=ranks, resuming=resuming, starts=True)

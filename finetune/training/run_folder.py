"""What a start finds: the configuration of its run, and its folder, new or of an earlier start."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.checkpoint.folder import starting_point
from finetune.checkpoint.manifest import config_difference
from finetune.config import RunConfig
from finetune.files.atomic import write_file
from finetune.planner.foresight import resolve_auto_here
from finetune.settings.checks import require
from finetune.settings.problems import Problem
from finetune.settings.recipes import effective, load_recipe


def read_run(name: str, overrides: Sequence[str], *, ranks: int) -> tuple[RunConfig, Path, Sequence[Problem]]:
    """Return a run's configuration, without any `auto` for this machine, its folder, and warnings; raise on errors."""
    config, problems = load_recipe(name, overrides)
    folder = config.run.path
    config = config if any(problem.level == "error" for problem in problems) else resolve_auto_here(config, ranks=ranks)
    resuming = starting_point(folder / "checkpoints", config.checkpoint.resume) is not None
    return config, folder, require(config, problems, ranks=ranks, resuming=resuming, starts=True)


def _is_same(path: Path, config: RunConfig) -> bool:
    """Whether a run with this configuration began there: if it ended before its first checkpoint, it begins again."""
    if config.checkpoint.resume != "auto" or not path.exists():
        return False
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):  # damaged: nobody knows which run began there
        return False
    return isinstance(tree, dict) and not config_difference({str(key): tree[key] for key in tree}, effective(config))


def make_run_folder(folder: Path, config: RunConfig) -> None:
    """Make it, with the effective configuration in it; never overwrite the results of another run."""
    is_taken = (folder / "metrics.jsonl").exists() and not (
        starting_point(folder / "checkpoints", config.checkpoint.resume) or _is_same(folder / "config.yaml", config)
    )
    if is_taken:
        raise ValueError(
            f"run.name: {folder} holds a run already, and no checkpoint to resume from. Set another run.name, or "
            f"remove that folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "config.yaml.partial"
    write_file(beside, OmegaConf.to_yaml(OmegaConf.create(effective(config))).encode())
    beside.replace(folder / "config.yaml")  # a start that is killed here leaves the one of before

"""The folder of a run: whether another run's results are in it, and what it holds from the start."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.checkpoint.folder import starting_point
from finetune.checkpoint.manifest import config_difference
from finetune.config import RunConfig
from finetune.files.atomic import write_file
from finetune.settings.recipes import effective

TAKEN = "already contains a run, and no checkpoint to resume from"
FREE_IT = "Set another run.name, or remove that folder"


def _is_same(path: Path, config: RunConfig) -> bool:
    """Return whether a run with this configuration began there; without a checkpoint it begins again."""
    if config.checkpoint.resume != "auto" or not path.exists():
        return False
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):  # damaged: nobody knows which run began there
        return False
    return isinstance(tree, dict) and not config_difference({str(key): tree[key] for key in tree}, effective(config))


def is_taken(folder: Path, config: RunConfig) -> bool:
    """Return whether the folder has results of another run, and nothing to go on from."""
    return (folder / "metrics.jsonl").exists() and not (
        starting_point(folder / "checkpoints", config.checkpoint.resume) or _is_same(folder / "config.yaml", config)
    )


def make_run_folder(folder: Path, config: RunConfig) -> None:
    """Make it, with the effective configuration in it; never overwrite the results of another run."""
    if is_taken(folder, config):
        raise ValueError(f"run.name: {folder} {TAKEN}. {FREE_IT}")
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "config.yaml.partial"
    write_file(beside, OmegaConf.to_yaml(OmegaConf.create(effective(config))).encode())
    beside.replace(folder / "config.yaml")  # a start that is killed here leaves the one of before

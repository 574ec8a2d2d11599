"""The folder of a run, runs/<run.name>: made by rank 0, or found as an earlier start left it."""

from pathlib import Path

from omegaconf import OmegaConf

from finetune.checkpoint.folder import starting_point
from finetune.checkpoint.manifest import config_difference
from finetune.config import RunConfig
from finetune.settings.recipes import effective


def _is_same(path: Path, config: RunConfig) -> bool:
    """Whether a run with this configuration began there: one that ended before its first checkpoint begins again."""
    if config.checkpoint.resume != "auto" or not path.exists():
        return False
    begun = OmegaConf.to_container(OmegaConf.load(path))
    return isinstance(begun, dict) and not config_difference({str(key): begun[key] for key in begun}, effective(config))


def make_run_folder(folder: Path, config: RunConfig) -> None:
    """Make it, with the effective configuration in it; another run's results are not written over."""
    begun = (folder / "metrics.jsonl").exists() and not (
        starting_point(folder / "checkpoints", config.checkpoint.resume) or _is_same(folder / "config.yaml", config)
    )
    if begun:
        raise ValueError(
            f"run.name: {folder} holds a run already, and no checkpoint to resume from. Set another run.name, or "
            f"remove that folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(effective(config))))

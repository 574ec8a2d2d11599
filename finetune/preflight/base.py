"""The base of a run: there, complete, of the family that the recipe names. Loads no torch.

It reads headers, and in fp8 folders the scales, which are a 4096th of the weights.
"""

from contextlib import suppress
from pathlib import Path

from finetune.architecture.families import Family
from finetune.architecture.shapes import parameter_shapes
from finetune.config import RunConfig
from finetune.files.basefiles import BaseFiles, open_base
from finetune.files.fp8 import require_sound_scales
from finetune.files.hub import cached_folder, may_be_hub_id, model_folder, require_files, require_on_hub
from finetune.ranks.log import listed
from finetune.settings.problems import Problem, problem

LINES = 3
"""Damaged files that a message names."""


def look_at_base(config: RunConfig, family: Family | None) -> tuple[BaseFiles | None, list[Problem]]:
    """Return the base's files where they are complete, and what is wrong with them; a download is not made.

    Without a family, which an error in the recipe hides, only the folder is looked for.
    """
    if not config.model.path:
        remedy = "Set model.path to a folder (`moetune tiny base` makes a small one) or to a hub id"
        return None, [problem("model.path", "", "training needs a base model", remedy)]
    try:
        return _open(config, family), []
    except (ValueError, OSError) as error:
        lines = str(error).removeprefix("model.path: ").rstrip(".").splitlines()
        is_folder = Path(config.model.path).expanduser().is_dir()
        remedy = (
            "`moetune verify-base` checks every part of it"
            if is_folder
            else "Name a local folder if the hub cannot be reached"
        )
        return None, [problem("model.path", config.model.path, listed(lines, LINES, between="; "), remedy)]


def _open(config: RunConfig, family: Family | None) -> BaseFiles | None:
    """Open the base, or raise what is wrong; None for one that a download will bring or complete."""
    model, layout = config.model.path, config.model.layout
    shapes = None if family is None else parameter_shapes(family)
    if Path(model).expanduser().is_dir() or not may_be_hub_id(model):
        folder = model_folder(model)
        return None if shapes is None else _sound(open_base(folder, shapes, layout=layout))
    cached = cached_folder(model)
    files = None
    if cached is not None and shapes is not None:
        with suppress(ValueError):  # a download goes on where it ended
            files = open_base(require_files(cached), shapes, layout=layout)
    if files is None:
        require_on_hub(model)
        return None
    return _sound(files)


def _sound(files: BaseFiles) -> BaseFiles:
    require_sound_scales(files.scales.values())
    return files

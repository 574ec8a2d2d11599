"""All that would stop a run, at once, in two seconds and before any rank starts: `train` and `launch` ask. No torch."""

from collections.abc import Sequence

from finetune.checkpoint.folder import starting_point
from finetune.config import RunConfig
from finetune.preflight.base import look_at_base
from finetune.preflight.places import missing_paths
from finetune.preflight.run_folder import lock_problems, resume_problems, room_problems
from finetune.preflight.sources import packs, source_problems
from finetune.settings.checks import base_family, cross_check, missing_packages
from finetune.settings.problems import ConfigError, Problem
from finetune.settings.typed import related


def require_start(
    config: RunConfig, problems: Sequence[Problem], *, ranks: int, trains: bool = True, run_id: str = ""
) -> list[str]:
    """Raise one ConfigError with all that would stop this run; return lines about its places, warnings first.

    `problems` are those of reading the recipe; rank 0 prints the warnings among them. A run that does not train leaves
    the folder of the run alone.
    """
    known = [wrong.key for wrong in problems]
    checked = [*problems, *cross_check(config, ranks=ranks, known=known, resuming=_resumes(config))]
    checked += missing_packages(config)
    found, lines = place_problems(config, checked, trains=trains, run_id=run_id)
    everything = [*checked, *found]
    count = sum(wrong.level == "error" for wrong in everything)
    if count:
        raise ConfigError(everything, f"that {'keeps' if count == 1 else 'keep'} the run from starting")
    return [*(f"warning: {wrong}" for wrong in found), *lines]


def place_problems(
    config: RunConfig, checked: Sequence[Problem] = (), *, trains: bool = True, waits: bool = False, run_id: str = ""
) -> tuple[list[Problem], list[str]]:
    """Return what is wrong with the places that a configuration names, and lines about them.

    `checked` are the problems of its keys. What would only follow from one of them is not looked at. A run that `waits`
    in a queue may follow the one that works in its folder now.
    """
    wrong_keys = [wrong.key for wrong in checked if wrong.level == "error"]
    problems = [wrong for wrong in missing_paths(config) if not _is_known(wrong.key, wrong_keys)]
    missing = [wrong.key for wrong in problems]
    family = None if _is_known("model", wrong_keys) else base_family(config)
    base = None
    if "model.path" not in missing and not _is_known("model.path", wrong_keys):
        base, found = look_at_base(config, family)
        problems += found
    if not _is_known("data.sources", wrong_keys):
        problems += source_problems(config, missing=missing)
    if not wrong_keys and family is not None and trains:
        locked = [] if waits else list(lock_problems(config, run_id))
        problems += locked or room_problems(config, family)
        if not (locked or "checkpoint.resume" in missing):  # the other start changes what would be looked at
            problems += resume_problems(config, base)
    if wrong_keys or base is None or any(wrong.level == "error" for wrong in problems):
        return problems, []
    line, found = packs(config, base.folder)
    return [*problems, *found], [line]


def _is_known(key: str, wrong_keys: Sequence[str]) -> bool:
    return any(related(key, wrong) for wrong in wrong_keys)


def _resumes(config: RunConfig) -> bool:
    try:
        return starting_point(config.run.path / "checkpoints", config.checkpoint.resume) is not None
    except (ValueError, OSError):  # resume_problems says it
        return False

"""What `adapters:` asks for against what the base has. Each check returns problems; none raises. Loads no torch."""

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from finetune.architecture.families import Family
from finetune.architecture.parts import NO_LORA, PARTS, TIED
from finetune.architecture.shapes import parameter_counts
from finetune.config import AdaptersConfig
from finetune.settings.problems import Problem

_GEMM_ROWS = 8
"""Experts' r is a row of a grouped GEMM: 16 bytes, or a multiple; half of it suffices in float32."""


def adapter_problems(adapters: AdaptersConfig, base: Family | None) -> list[Problem]:
    """Everything wrong in the section, given the base's shape where it is known."""
    sections: dict[str, Any] = {part: getattr(adapters, part) for part in PARTS}
    problems = [problem for part, section in sections.items() for problem in _numbers(part, section)]
    problems += [
        _problem(f"adapters.{part}.mode", "lora", NO_LORA[part], "Use frozen or full")
        for part, section in sections.items()
        if section.mode == "lora" and part in NO_LORA
    ]
    modes = {part: section.mode for part, section in sections.items() if section.mode != "frozen"}
    if not modes:
        remedy = "Set adapters.attention.mode=lora, or another family's mode"
        problems.append(_problem("adapters", "all frozen", "nothing would train", remedy))
    if base is not None:
        problems += _absent(modes, base)
    start = adapters.start_from
    if start and not (Path(start) / "adapter_config.json").is_file():
        remedy = "Name the folder that holds it, or leave the key out"
        problems.append(_problem("adapters.start_from", start, "there is no adapter_config.json in it", remedy))
    return problems


def _absent(modes: dict[str, str], base: Family) -> list[Problem]:
    """What is asked for and is not in the base, or is in it only as a part of something else."""
    counts, problems = asdict(parameter_counts(base)), []
    for part, mode in modes.items():
        key = f"adapters.{part}.mode"
        if part in TIED and base.tie_word_embeddings:
            allowed = f"{base.name} ties its head to its embedding, so training one would change both"
            problems.append(_problem(key, mode, allowed, "Leave it frozen"))
        elif counts[part] == 0:
            allowed = f"{base.name} has no such parameters"
            problems.append(_problem(key, mode, allowed, "Leave it frozen"))
    return problems


def _numbers(name: str, family: Any) -> list[Problem]:
    """Ranges; and numbers that were set where nothing reads them."""
    values = {key: value for key, value in asdict(family).items() if key not in ("mode", "lr")}
    if family.lr and not (isfinite(family.lr) and family.lr > 0):
        allowed = "a finite number above 0 is wanted, or 0 for optim.lr"
        return [_problem(f"adapters.{name}.lr", family.lr, allowed, "Set it to one")]
    if family.lr and family.mode == "frozen":
        remedy = f"Set adapters.{name}.mode to lora or full, or leave it out"
        return [_problem(f"adapters.{name}.lr", family.lr, "the family is frozen", remedy, warning=True)]
    if family.mode != "lora":
        unlike = [key for key, value in values.items() if value != getattr(type(family), key)]
        allowed = f"it counts in mode lora only, and adapters.{name}.mode is {family.mode}"
        remedy = f"Set adapters.{name}.mode=lora, or leave it out"
        return [_problem(f"adapters.{name}.{key}", values[key], allowed, remedy, warning=True) for key in unlike]
    problems = []
    if "r" in values and values["r"] < 1:
        problems.append(_problem(f"adapters.{name}.r", values["r"], "at least 1 is wanted", "8 and 16 are usual"))
    elif name == "experts" and values["r"] % _GEMM_ROWS:
        in_float32 = values["r"] % (_GEMM_ROWS // 2) == 0
        allowed = f"the experts' GEMMs want a multiple of {_GEMM_ROWS}" + (" in bfloat16" if in_float32 else "")
        nearest = -(-values["r"] // _GEMM_ROWS) * _GEMM_ROWS
        problems.append(
            _problem("adapters.experts.r", values["r"], allowed, f"Use {nearest}", warning=in_float32)
        )  # fmt: skip
    if "alpha" in values and not (isfinite(values["alpha"]) and values["alpha"] > 0):
        allowed = "a finite number above 0 is wanted"
        problems.append(_problem(f"adapters.{name}.alpha", values["alpha"], allowed, "Twice r is usual"))
    if not 0 <= values.get("dropout", 0.0) < 1:
        allowed = "a share from 0 to below 1 is wanted"
        problems.append(_problem(f"adapters.{name}.dropout", values["dropout"], allowed, "0.05 is usual"))
    return problems


def _problem(key: str, found: object, allowed: str, remedy: str, *, warning: bool = False) -> Problem:
    return Problem(key=key, found=found, allowed=allowed, remedy=remedy, level="warning" if warning else "error")

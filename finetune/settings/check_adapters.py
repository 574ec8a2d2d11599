"""Checks `adapters:` against the parts of the base. Each check returns problems; none raises. Loads no torch."""

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from finetune.architecture.families import Family
from finetune.architecture.parts import NO_LORA, PARTS, QUANTISED_DENSE, TIED
from finetune.architecture.shapes import parameter_counts
from finetune.config import AdaptersConfig, RunConfig
from finetune.settings.problems import Problem, problem

_QUANTISED = {"experts": ("experts",), "dense": QUANTISED_DENSE}
"""The parts of each key of `model.quantise`."""
_GEMM_ROWS = 8
"""Experts' r is a row of a grouped GEMM, which needs multiples of 16 bytes: of 8 in bfloat16, of 4 in float32."""


def adapter_problems(adapters: AdaptersConfig, base: Family | None) -> list[Problem]:
    """Return all problems of the section, given the base's shape if it is known."""
    sections: dict[str, Any] = {part: getattr(adapters, part) for part in PARTS}
    problems = [wrong for part, section in sections.items() for wrong in _numbers(part, section)]
    problems += [
        problem(f"adapters.{part}.mode", "lora", NO_LORA[part], "Use frozen or full")
        for part, section in sections.items()
        if section.mode == "lora" and part in NO_LORA
    ]
    modes = {part: section.mode for part, section in sections.items() if section.mode != "frozen"}
    if not modes:
        remedy = "Set adapters.attention.mode=lora, or the mode of another part"
        problems.append(problem("adapters", "all frozen", "nothing would train", remedy))
    if base is not None:
        problems += _absent(modes, base)
    start = adapters.start_from
    if start and not (Path(start) / "adapter_config.json").is_file():
        remedy = "Name the folder that holds it, or leave the key out"
        problems.append(problem("adapters.start_from", start, "there is no adapter_config.json in it", remedy))
    return problems


def quantise_problems(config: RunConfig, base: Family | None) -> list[Problem]:
    """Return parts that are quantised although they train in full or are missing, and what else cannot go with it."""
    problems = []
    modes = {part: getattr(config.adapters, part).mode for part in PARTS}
    for name, parts in _QUANTISED.items():
        key, bits = f"model.quantise.{name}", getattr(config.model.quantise, name)
        if bits == "none":
            continue
        for part in parts:
            if modes[part] == "full":
                allowed = f"adapters.{part}.mode is full, and weights that train cannot be quantised"
                problems.append(problem(key, bits, allowed, f"Set {key}=none, or adapters.{part}.mode=lora or frozen"))
        if name == "experts" and base is not None and base.text.experts is None:
            allowed = f"{base.name} is dense: it has no experts"
            problems.append(problem(key, bits, allowed, "Set model.quantise.dense instead"))
        if not problems and "lora" not in modes.values():
            allowed = "a run without a part in mode lora writes a complete model, which quantised weights cannot give"
            problems.append(problem(key, bits, allowed, f"Set the mode of a part to lora, or {key}=none"))
    return problems


def _absent(modes: dict[str, str], base: Family) -> list[Problem]:
    """Return the parts that would train but are missing in the base, or are tied to another part."""
    counts, problems = asdict(parameter_counts(base)), []
    for part, mode in modes.items():
        key = f"adapters.{part}.mode"
        if part in TIED and base.tie_word_embeddings:
            allowed = f"{base.name} ties its head to its embedding, so training one would change both"
            problems.append(problem(key, mode, allowed, "Leave it frozen"))
        elif counts[part] == 0:
            allowed = f"{base.name} has no such parameters"
            problems.append(problem(key, mode, allowed, "Leave it frozen"))
    return problems


def _numbers(part: str, section: Any) -> list[Problem]:
    """Return numbers that are out of range, and those that are set but not used."""
    key = f"adapters.{part}"
    if section.lr and not (isfinite(section.lr) and section.lr > 0):
        allowed = "it must be a finite number above 0, or 0 for optim.lr"
        return [problem(f"{key}.lr", section.lr, allowed, "Set another value")]
    if section.lr and section.mode == "frozen":
        remedy = f"Set {key}.mode to lora or full, or leave it out"
        return [problem(f"{key}.lr", section.lr, "the part is frozen", remedy, warning=True)]
    values = {name: value for name, value in asdict(section).items() if name not in ("mode", "lr")}
    if section.mode == "lora":
        return _lora_numbers(part, values)
    allowed = f"it is used only in mode lora, but {key}.mode is {section.mode}"
    remedy = f"Set {key}.mode=lora, or leave it out"
    return [
        problem(f"{key}.{name}", value, allowed, remedy, warning=True)
        for name, value in values.items()
        if value != getattr(type(section), name)
    ]


def _lora_numbers(part: str, values: dict[str, Any]) -> list[Problem]:
    """Return numbers that a low-rank part cannot have, or that its kernels support only in float32."""
    key, problems = f"adapters.{part}", []
    if "r" in values and values["r"] < 1:
        problems.append(problem(f"{key}.r", values["r"], "it must be at least 1", "8 and 16 are usual"))
    elif part == "experts" and values["r"] % _GEMM_ROWS:
        in_float32 = values["r"] % (_GEMM_ROWS // 2) == 0
        allowed = f"the experts' GEMMs need a multiple of {_GEMM_ROWS}" + (" in bfloat16" if in_float32 else "")
        nearest = -(-values["r"] // _GEMM_ROWS) * _GEMM_ROWS
        problems.append(problem(f"{key}.r", values["r"], allowed, f"Use {nearest}", warning=in_float32))
    if "alpha" in values and not (isfinite(values["alpha"]) and values["alpha"] > 0):
        allowed = "it must be a finite number above 0"
        problems.append(problem(f"{key}.alpha", values["alpha"], allowed, "Twice r is usual"))
    if not 0 <= values.get("dropout", 0.0) < 1:
        allowed = "it must be from 0 to below 1"
        problems.append(problem(f"{key}.dropout", values["dropout"], allowed, "0.05 is usual"))
    return problems

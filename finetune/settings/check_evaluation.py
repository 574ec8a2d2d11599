"""Checks the `eval:` section: its metric, its sources and the bounds of guards. Loads no torch."""

from math import isfinite

from data.config import SourceConfig
from finetune.architecture.parts import PARTS
from finetune.config import EvalConfig, EvalSourceConfig, RunConfig
from finetune.settings.problems import Problem, problem

HIGHER_IS_BETTER = {"loss": False, "accuracy": True, "kl": False}
"""The quantities that eval.metric may name."""
NO_BASE = "no part trains in mode lora, so no adapter can be switched off to get the base"


def eval_problems(config: RunConfig) -> list[Problem]:
    """Return every problem at once."""
    section, has_lora = config.eval, _has_lora(config)
    problems = []
    for key, least in {"every_steps": 0, "patience": 0, "answers": 0, "answer_tokens": 1}.items():
        if getattr(section, key) < least:
            allowed, remedy = f"it must be at least {least}", f"Set {least} or more"
            problems.append(problem(f"eval.{key}", getattr(section, key), allowed, remedy))
    if section.answers > 0:
        problems += _answers(config)
    if section.metric:
        problems += _metric(section, has_lora=has_lora)
    elif section.patience > 0:
        remedy = "Set eval.metric=<source>/loss, or drop eval.patience"
        allowed = "it counts evaluations without a better eval.metric, which is not set"
        problems.append(problem("eval.patience", section.patience, allowed, remedy))
    trained_on = {_part_of(source): name for name, source in config.data.sources.items()}
    for name, source in section.sources.items():
        problems += _source(name, source, has_lora=has_lora)
        if _part_of(source) in trained_on:
            allowed = f"data.sources.{trained_on[_part_of(source)]} trains on the same path: nothing is held out"
            remedy = "Split it first: `moetune shards split`"
            problems.append(problem(f"eval.sources.{name}.path", source.path, allowed, remedy, warning=True))
    return problems


def _part_of(source: SourceConfig | EvalSourceConfig) -> tuple[str, str, str]:
    return source.path, source.config, source.split


def _metric(section: EvalConfig, *, has_lora: bool) -> list[Problem]:
    source, _, quantity = section.metric.rpartition("/")
    if source not in section.sources or quantity not in HIGHER_IS_BETTER:
        known = ", ".join(f"{name}/{kind}" for name in section.sources for kind in HIGHER_IS_BETTER)
        remedy = f"Use one of {known}" if known else "Add eval.sources.<name>.path=..., or drop eval.metric"
        allowed = "it must be <source>/loss, <source>/accuracy or <source>/kl, with a source of eval.sources"
        return [problem("eval.metric", section.metric, allowed, remedy)]
    if quantity == "kl" and not has_lora:
        return [problem("eval.metric", section.metric, NO_BASE, f"Use {source}/loss or {source}/accuracy")]
    return []


def _answers(config: RunConfig) -> list[Problem]:
    """Return the reasons why questions cannot be answered during training."""
    key, value = "eval.answers", config.eval.answers
    problems = []
    if not config.eval.sources:
        remedy = "Add eval.sources.<name>.path=..., or drop eval.answers"
        problems.append(problem(key, value, "there is no held-out source to ask about", remedy))
    if config.parallel.resident == "none":
        remedy = "Drop it and use `moetune eval` on a checkpoint's adapter, or set parallel.resident=frozen"
        problems.append(problem(key, value, "partitioned weights would be gathered for each token", remedy))
    if config.parallel.sp > 1 or any(stage.sp > 1 for stage in config.stages.values()):
        remedy = "Drop it and use `moetune eval` on a checkpoint's adapter, or set sp=1"
        problems.append(problem(key, value, "ranks that share a row each hold a part of the answer", remedy))
    return problems


def _source(name: str, source: EvalSourceConfig, *, has_lora: bool) -> list[Problem]:
    key = f"eval.sources.{name}"
    problems = []
    if "/" in name:
        allowed = "it must be a name without /, which separates source and quantity in eval.metric"
        problems.append(problem(key, name, allowed, "Rename it"))
    bounds = {"max_kl": source.max_kl, "max_loss_rise": source.max_loss_rise}
    for bound, value in bounds.items():
        if value is not None and not (isfinite(value) and value >= 0):
            problems.append(
                problem(
                    f"{key}.{bound}", value, "it must be a finite number of 0 or more", f"Set another {key}.{bound}"
                )
            )
        elif value is not None and source.guard == "none":
            remedy = f"Set {key}.guard to flag or stop, or drop the bound"
            problems.append(problem(f"{key}.{bound}", value, "no guard reads it", remedy))
    if source.guard != "none" and set(bounds.values()) == {None}:
        remedy = f"Set {key}.max_kl or {key}.max_loss_rise"
        problems.append(problem(f"{key}.guard", source.guard, "the source has no bound", remedy))
    if source.max_kl is not None and not has_lora:
        problems.append(problem(f"{key}.max_kl", source.max_kl, NO_BASE, f"Set {key}.max_loss_rise instead"))
    return problems


def _has_lora(config: RunConfig) -> bool:
    return any(getattr(config.adapters, part).mode == "lora" for part in PARTS)

"""Checks `optim:`, `schedule:` and `stages:`. Each check yields problems; none raises. Loads no torch."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

from data.checks import data_problems
from finetune.architecture.parts import PARTS
from finetune.config import OptimConfig, RunConfig, ScheduleConfig, StageConfig
from finetune.settings.problems import ConfigError, Problem, did_you_mean, problem
from finetune.settings.stages import run_stages, stage_data, trained_parts

MOST_BETA = 0.99
"""A mean that moves by less than 1 % a step may stand still in bfloat16, whose steps are 0.4 to 0.8 %."""


def schedule_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield numbers that are out of range, and lengths that do not fit the run."""
    schedule = config.schedule
    if not (isfinite(schedule.epochs) and schedule.epochs >= 0):
        allowed = "it must be a finite number above 0, or 0 for schedule.steps"
        yield problem("schedule.epochs", schedule.epochs, allowed, "1 to 3 are usual")
        return
    if schedule.steps < 1 and not (schedule.epochs and schedule.steps == 0):
        yield problem("schedule.steps", schedule.steps, "it must be at least 1", "Set schedule.steps=1 or more")
        return
    if not 0 <= schedule.warmup_steps <= most_steps(schedule):
        allowed = (
            f"it must be from 0 to the {schedule.steps} steps of the run" if schedule.steps else "it must be at least 0"
        )
        yield problem("schedule.warmup_steps", schedule.warmup_steps, allowed, "3 % of the steps are usual")
    if not 0 <= schedule.final_share <= 1:
        yield problem(
            "schedule.final_share", schedule.final_share, "it must be a share from 0 to 1", "0 and 0.1 are usual"
        )
    left = most_steps(schedule) - max(0, schedule.warmup_steps)
    if schedule.shape == "wsd" and not 1 <= schedule.decay_steps <= left:
        allowed = f"with shape wsd it must be from 1 to {left}, the steps of the run after the warm-up"
        remedy = f"10 % of the run, {max(1, schedule.steps // 10)}, is usual"
        if not schedule.steps:
            allowed, remedy = "with shape wsd it must be at least 1", "10 % of the run is usual"
        yield problem("schedule.decay_steps", schedule.decay_steps, allowed, remedy)
    elif schedule.shape != "wsd" and schedule.decay_steps:
        allowed = f"it has no effect, because schedule.shape is {schedule.shape}"
        remedy = "Set schedule.shape=wsd, or leave it out"
        yield problem("schedule.decay_steps", schedule.decay_steps, allowed, remedy)
    yield from _optim_problems(config.optim)


def _optim_problems(optim: OptimConfig) -> Iterator[Problem]:
    for name, beta in zip(("first", "second"), optim.betas, strict=True):
        if not 0 <= beta < 1:
            yield problem("optim.betas", beta, f"the {name} one must be from 0 to below 1", "[0.9, 0.95] are usual")
    if optim.moments == "bfloat16" and optim.betas[1] > MOST_BETA:
        allowed = (
            f"with optim.moments=bfloat16 the second one must be at most {MOST_BETA}: a slower mean would not move"
        )
        yield problem("optim.betas", optim.betas[1], allowed, "Set 0.95, or optim.moments=float32")
    for key, value in {"eps": optim.eps, "weight_decay": optim.weight_decay, "clip_norm": optim.clip_norm}.items():
        if not (isfinite(value) and value >= 0):
            yield problem(f"optim.{key}", value, "it must be a finite number of 0 or more", f"Set another optim.{key}")


def most_steps(schedule: ScheduleConfig) -> int:
    """Return the steps of the run, or the largest integer while the steps of epochs are not counted yet."""
    return schedule.steps or (sys.maxsize if schedule.epochs else 0)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """Return a run of epochs with their counted steps; raise ConfigError if the steps do not suit the schedule."""
    config = replace(config, schedule=replace(config.schedule, steps=steps))
    problems = [*schedule_problems(config), *stage_problems(config)]
    if any(wrong.level == "error" for wrong in problems):
        raise ConfigError(problems)
    return config


def stage_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield stages that never begin or begin together, and those with frozen or unknown parts or sources."""
    if not config.stages or most_steps(config.schedule) < 1 or not config.optim.lr > 0:
        return
    if config.schedule.epochs and any(stage.data != config.data for stage in run_stages(config)):
        allowed = "the stages read different data, so an epoch has no fixed length"
        yield problem("schedule.epochs", config.schedule.epochs, allowed, "Set schedule.steps")
    firsts = Counter(stage.from_step for stage in config.stages.values())
    for name, stage in config.stages.items():
        key = f"stages.{name}.from_step"
        if not 0 <= stage.from_step < most_steps(config.schedule):
            steps = config.schedule.steps
            allowed = f"it must be a step of the run, 0 to {steps - 1}" if steps else "it must be at least 0"
            remedy = "Begin earlier, or raise schedule.steps" if steps else "Set 0 or more"
            yield problem(key, stage.from_step, allowed, remedy)
        elif firsts[stage.from_step] > 1:
            allowed = "another stage begins at the same step"
            yield problem(key, stage.from_step, allowed, "Give each stage its own first step")
        yield from _stage(config, name, stage)
    for part in trained_parts(config):
        if all(part not in stage.peaks for stage in run_stages(config)):
            mode = getattr(config.adapters, part).mode
            allowed = "no stage trains it"
            remedy = f"Name {part} in stages.<name>.train, or leave it frozen"
            yield problem(f"adapters.{part}.mode", mode, allowed, remedy)


def _stage(config: RunConfig, name: str, stage: StageConfig) -> Iterator[Problem]:
    key = f"stages.{name}"
    for part in stage.train:
        if part not in PARTS:
            yield problem(f"{key}.train", part, "no such part", did_you_mean(part, list(PARTS)))
        elif getattr(config.adapters, part).mode == "frozen":
            remedy = f"Set adapters.{part}.mode to lora or full, or remove it from the list"
            yield problem(f"{key}.train", part, f"adapters.{part}.mode is frozen", remedy)
    if not (isfinite(stage.lr) and stage.lr >= 0):
        yield problem(
            f"{key}.lr", stage.lr, "it must be a finite number above 0, or 0 for optim.lr", f"Set another {key}.lr"
        )
    if stage.warmup_steps < 0:
        yield problem(f"{key}.warmup_steps", stage.warmup_steps, "it must be at least 0", "Set 0 or more")
    for source in stage.data.weights:
        if source not in config.data.sources:
            remedy = did_you_mean(source, list(config.data.sources))
            yield problem(f"{key}.data.weights.{source}", stage.data.weights[source], "no such source", remedy)
    of_the_run = set(map(str, data_problems(config.data)))
    for wrong in data_problems(stage_data(config, stage)):
        if str(wrong) not in of_the_run:
            own_key = f"{key}.{_stage_key(wrong.key)}"
            yield replace(wrong, key=own_key, remedy=wrong.remedy.replace(wrong.key, own_key))


def _stage_key(key: str) -> str:
    """Return the key of a stage for a key of `data:`; weights of sources have a section of their own."""
    source = key.removeprefix("data.sources.").removesuffix(".weight")
    return f"data.weights.{source}" if key.startswith("data.sources.") else key

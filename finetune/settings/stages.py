"""The stages of a run: the parts that train, on which data, from which step on. Pure functions; loads no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.config import DataConfig
from finetune.architecture.parts import PARTS
from finetune.config import RunConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the run. It does not depend on the progress of the run, so that any step can be resumed."""

    name: str
    number: int
    first: int
    end: int
    peaks: Mapping[str, float]
    """The parts of the model that train, each with its highest learning rate."""
    warmup_steps: int
    data: DataConfig
    sp: int

    @property
    def steps(self) -> int:
        """Return the number of steps of the stage."""
        return self.end - self.first


def run_stages(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages in order, from step 0 to the last; a run without `stages:` is one unnamed stage."""
    named = sorted(config.stages.items(), key=lambda item: item[1].from_step)
    if not named or named[0][1].from_step > 0:
        named.insert(0, ("", StageConfig()))
    ends = [stage.from_step for _, stage in named[1:]] + [config.schedule.steps]
    return tuple(
        Stage(
            name=name,
            number=number,
            first=stage.from_step,
            end=end,
            peaks={
                name: stage.lr or getattr(config.adapters, name).lr or config.optim.lr
                for name in trained_parts(config)
                if name in (stage.train or PARTS)
            },
            warmup_steps=stage.warmup_steps,
            data=stage_data(config, stage),
            sp=stage.sp or config.parallel.sp,
        )
        for number, ((name, stage), end) in enumerate(zip(named, ends, strict=True))
    )


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that a step belongs to."""
    return next(stage for stage in reversed(stages) if stage.first <= step or stage.number == 0)


def trained_parts(config: RunConfig) -> list[str]:
    """Return the parts that are not frozen, in the order of `adapters:`."""
    return [part for part in PARTS if getattr(config.adapters, part).mode != "frozen"]


def stage_data(config: RunConfig, stage: StageConfig) -> DataConfig:
    """Return the `data:` section of a stage."""
    changes: dict[str, Any] = {key: value for key, value in vars(stage.data).items() if value is not None}
    weights = changes.pop("weights")
    sources = {
        name: replace(source, weight=weights.get(name, source.weight)) for name, source in config.data.sources.items()
    }
    return replace(config.data, sources=sources, **changes)


def longest_pack(stages: Sequence[Stage]) -> int:
    """Return the tokens of the longest packed row of the run."""
    return max(stage.data.tokens_per_pack for stage in stages)


def by_stage(config: RunConfig, key: str) -> list[tuple[str, int]]:
    """Return the values of one key of `data:` by dotted key: the run's, then those of the stages that set it."""
    of_stages = [(f"stages.{name}.data.{key}", getattr(stage.data, key)) for name, stage in config.stages.items()]
    return [(f"data.{key}", getattr(config.data, key)), *(entry for entry in of_stages if entry[1] is not None)]

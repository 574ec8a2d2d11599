"""The optimiser's groups: parameters with the same learning rate in every stage; and the start of a stage.

All parameters that may ever train have their masters and moments from the start. A stage pauses those that it does not
train: they require no gradient, so none is computed, and the rate of their groups is 0, which changes no bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from finetune.config import RunConfig
from finetune.model.empty import EmptyModel
from finetune.model.lora import adapted_part
from finetune.ranks.engine import Group
from finetune.ranks.hooks import forget_order
from finetune.settings.schedule import learning_rate
from finetune.settings.stages import Stage


def trained_groups(empty: EmptyModel, stages: Sequence[Stage]) -> list[Group]:
    """Group the parameters that train by their learning rates in all stages, in as few groups as possible."""
    by_peaks: dict[tuple[float, ...], list[nn.Parameter]] = {}
    for name in empty.trained:
        part = adapted_part(empty.canonical(name))
        peaks = tuple(stage.peaks.get(part, 0.0) for stage in stages)
        by_peaks.setdefault(peaks, []).append(empty.module.get_parameter(name))
    return [Group(parameters=tuple(parameters), peaks=peaks) for peaks, parameters in by_peaks.items()]


def enter(engine: Any, stage: Stage, *, at: int) -> str:
    """Make only the stage's parameters trainable; every rank must call this before step `at` of the stage.

    At its first step, parameters that did not train in the stage before start without moments. Returns a sentence that
    describes the stage.
    """
    for group, parameters, flat in _groups(engine):
        trains = group["peaks"][stage.number] > 0
        trained = stage.number > 0 and group["peaks"][stage.number - 1] > 0
        for parameter in parameters:
            parameter.requires_grad_(trains)
        if at == stage.first and trains and not trained:
            for moment in engine.optimizer.optimizer.state[flat].values():
                moment.zero_()
    forget_order(engine)
    return f"from step {at}{f', stage {stage.name}' if stage.name else ''}: {', '.join(stage.peaks)} train"


def set_rates(engine: Any, step: int, stage: Stage, config: RunConfig) -> Mapping[str, float]:
    """Set the learning rate of every group, 0 where the stage pauses it; return the highest of them as `lr`."""
    groups = engine.optimizer.param_groups
    for group in groups:
        peak = group["peaks"][stage.number]
        group["lr"] = learning_rate(step, peak=peak, schedule=config.schedule, stage=stage)
    return {"lr": max(group["lr"] for group in groups)}


def _groups(engine: Any) -> Iterator[tuple[dict[str, Any], Sequence[nn.Parameter], Any]]:
    """Yield each group with its parameters and the flat tensor of this rank's slices, which ZeRO-3 made."""
    zero = engine.optimizer
    for number, (parameters, flat) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        yield zero.param_groups[zero.sub_group_to_group_id[number]], parameters, flat

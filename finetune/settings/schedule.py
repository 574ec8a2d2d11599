"""Computes the learning rate of a step as a pure function, so that any step can be resumed or plotted. No torch."""

from math import cos, isclose, pi

from finetune.config import ScheduleConfig
from finetune.settings.stages import Stage


def learning_rate(step: int, *, peak: float, schedule: ScheduleConfig, stage: Stage | None = None) -> float:
    """Return the rate of a step, counted from 0: a linear rise to `peak`, then the shape, down to its final_share.

    A stage may also warm up from its own first step.
    """
    rate = peak * _share(step, schedule)
    if stage is not None:
        rate *= min(1.0, (step - stage.first + 1) / max(1, stage.warmup_steps))
    return rate


def first_difference(before: ScheduleConfig, now: ScheduleConfig) -> int | None:
    """Return the first step, counted from 0, at which two schedules differ; None if there is none."""
    for step in range(max(before.steps, now.steps)):
        if not isclose(_share(step, before), _share(step, now), rel_tol=1e-12):
            return step
    return None


def _share(step: int, schedule: ScheduleConfig) -> float:
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    first = schedule.steps - schedule.decay_steps if schedule.shape == "wsd" else schedule.warmup_steps
    # only the last step has the lowest rate; wsd begins to fall in its first decay step
    span = schedule.decay_steps if schedule.shape == "wsd" else max(1, schedule.steps - first - 1)
    done = min(1.0, max(0, step - first + (schedule.shape == "wsd")) / max(1, span))
    left = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "wsd": 1.0 - done,
        "cosine": (1.0 + cos(pi * done)) / 2,
    }[schedule.shape]
    low = 1.0 if schedule.shape == "constant" else schedule.final_share
    return low + (1.0 - low) * left

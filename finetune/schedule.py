"""The learning rate of a step: a pure function, so that any step can be resumed or drawn. Loads no torch."""

from math import cos, pi

from finetune.config import ScheduleConfig


def learning_rate(step: int, *, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up to `peak`, then constant, or down to final_share of it."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    span = max(1, schedule.steps - schedule.warmup_steps - 1)
    done = min(1.0, (step - schedule.warmup_steps) / span)
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + cos(pi * done)) / 2}[schedule.shape]
    low = 1.0 if schedule.shape == "constant" else schedule.final_share
    return peak * (low + (1.0 - low) * left)

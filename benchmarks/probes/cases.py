"""The training questions of a tiny model for each probe, and the two columns that are compared."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.probes.letters import letter_trial
from finetune.probes.order import ENDS, order_trial
from finetune.probes.timestamps import RATES, time_trial
from finetune.probes.trial import Trial

FRAME = 32
"""Side of a frame in pixels: one token."""
SIDES = (64, 96)
"""Sides of the pictures with letters, in training."""
SIDE = 96
"""The side that is probed; with half the pixels it is 64."""
HEIGHTS = (13, 28)
"""Heights of the letters in training, from and to; all of them are legible as shown."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A probe that must detect something."""

    probe: str
    draw: Callable[[int], Trial]
    """Returns a question to train on, by its number."""
    options: Mapping[str, Any]
    """Arguments of the probe."""
    rows: tuple[str, ...]
    """Rows of the probe's table whose mean is compared."""
    columns: tuple[str, str]
    """With the mechanism, and without it."""
    about: str
    """Words for the page on the training questions."""
    samples: int = 2500
    steps: int = 100
    rate: float = 3e-3
    zeroed: tuple[str, ...] = field(default=())
    """Parts of tensors' names: these start as zeros and stay frozen."""


def _letters(number: int) -> Trial:
    draw = random.Random(f"{number}/training")
    return letter_trial(draw.randint(*HEIGHTS), side=draw.choice(SIDES), seed=number)


def _order(number: int) -> Trial:
    return order_trial(random.Random(f"{number}/training").choice(ENDS), seed=number, side=FRAME)


def _time(number: int) -> Trial:
    rate = random.Random(f"{number}/training").choice(list(RATES.values()))
    return time_trial("when", rate, "seconds", seed=number, side=FRAME)


CASES = (
    Case(
        probe="timestamps",
        draw=_time,
        options={"side": FRAME, "trials": 20, "forms": ("seconds",)},
        rows=tuple(f"{rate}, seconds" for rate in RATES),
        columns=("when", "when, no stamps"),
        about="when the only coloured stretch of a clip is, to a tenth of a second, at all four rates",
        steps=300,
        samples=4000,
    ),
    Case(
        probe="deepstack",
        draw=_letters,
        options={"side": SIDE, "trials": 40, "heights": (16, 20)},
        rows=("16 px", "20 px"),
        columns=("on", "off"),
        about="letters, with the last features of the tower zeroed, so that all comes by DeepStack",
        zeroed=("visual.merger.linear_fc2",),
    ),
    Case(
        probe="order",
        draw=_order,
        options={"side": FRAME, "trials": 40},
        rows=("first colour", "last colour"),
        columns=("in order", "shuffled"),
        about="which of three colours comes first or last",
        steps=200,
        rate=2e-3,
    ),
    Case(
        probe="resolution",
        draw=_letters,
        options={"side": SIDE, "trials": 40, "heights": (14, 28)},
        rows=("14 px",),
        columns=("all pixels", "1/2"),
        about="letters that are legible as shown",
    ),
)

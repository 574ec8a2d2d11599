"""`timestamps`: when is a colour shown, and which is shown at a time? The control leaves the times out of the text."""

import random
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from data.render.timestamps import Stamps, stamp_text
from finetune.ask.overlaps import time_iou
from finetune.ask.speaker import Speaker
from finetune.probes.colours import PAIR, colour_frames, several
from finetune.probes.effects import stamped
from finetune.probes.score import Score
from finetune.probes.trial import Clip, Trial, answers, is_right

Asked = Literal["when", "what at"]
ASKED: tuple[Asked, ...] = ("when", "what at")
FORMS: tuple[Stamps, ...] = ("seconds", "hms", "mixed")
RATES: dict[str, float | None] = {"0.5 fps": 0.5, "1 fps": 1.0, "4 fps": 4.0, "variable fps": None}
STRETCHES = 3
"""Stretches of a clip, each of another colour, or one coloured and the others grey."""
MOMENTS = 2
"""Pairs of frames of a stretch."""
LATEST = 5
"""Whole seconds at which a clip begins at the latest, so that the place of a frame does not give its time away."""
GAPS = (0.5, 1.0, 2.0, 3.0)
"""Seconds between frames at a variable rate."""


def time_trial(asked: Asked, rate: float | None, form: Stamps, *, seed: int, side: int) -> Trial:
    """Make a clip, and ask for the time of its only colour or for its colour at a time; times are as in the text."""
    draw, name = random.Random(f"{seed}/time"), f"time/{seed}"
    colours = several(draw, STRETCHES)
    gaps = [draw.choice(GAPS) if rate is None else 1 / rate for _ in range(PAIR * MOMENTS * STRETCHES - 1)]
    times = draw.randint(0, LATEST) + np.cumsum([0.0, *gaps])
    stamps = times.reshape(-1, PAIR).mean(1).tolist()
    at = draw.randrange(STRETCHES)
    texts = [_bare(stamp, form, name) for stamp in stamps[at * MOMENTS : (at + 1) * MOMENTS]]
    shown: list[str | None] = [*colours]
    if asked == "when":
        question = f"When is the picture {colours[at]}? Answer with the first and the last time."
        answer = f"{texts[0]} to {texts[-1]}"
        shown = [colour if number == at else None for number, colour in enumerate(colours)]
    else:
        question = f"Which colour is the picture at {draw.choice(texts)}? Answer with the colour alone."
        answer = colours[at]
    frames = colour_frames([colour for colour in shown for _ in range(PAIR * MOMENTS)], side=side)
    clip = Clip(frames=frames, times=tuple(times.tolist()))
    return Trial(name=name, question=f"<video>{question}", answer=answer, clips=(clip,))


def _bare(stamp: float, form: Stamps, name: str) -> str:
    """Return a time as it stands in the text, without its brackets: `3.0 seconds` or `00:00:03`."""
    return stamp_text(stamp, form, f"{name}/0")[1:-1]


def probe(speaker: Speaker, *, trials: int, seed: int, side: int, forms: Sequence[Stamps] = FORMS) -> Iterator[Score]:
    """Yield the scores by rate, form and question, with the times in the text and without."""
    for form in forms:
        for rate_name, rate in RATES.items():
            for asked in ASKED:
                shown = [
                    time_trial(asked, rate, form, seed=number, side=side)
                    for number in range(seed * 1000, seed * 1000 + trials)
                ]
                for written, column in ((form, ""), ("none", ", no stamps")):
                    with stamped(speaker, written):
                        replies = list(answers(speaker, shown))
                    pairs = list(zip(replies, shown, strict=True))
                    row = f"{rate_name}, {form}"
                    exact = sum(is_right(reply, trial.answer) for reply, trial in pairs) / trials
                    yield Score(row=row, column=f"{asked}{column}", value=exact, trials=trials)
                    if asked == "when":
                        overlap = sum(time_iou(reply, [trial.answer]) for reply, trial in pairs) / trials
                        yield Score(row=row, column=f"time-iou{column}", value=overlap, trials=trials)

"""`order`: which of three colours comes first in a clip, and which last? The control shuffles the frames."""

import random
from collections.abc import Iterator
from dataclasses import replace

from finetune.ask.speaker import Speaker
from finetune.probes.colours import PAIR, colour_frames, several
from finetune.probes.score import Score
from finetune.probes.trial import Clip, Trial, answers, is_right

COLOURED = 3
"""Colours of a clip, each shown for one moment."""
ENDS = ("first", "last")


def order_trial(end: str, *, seed: int, side: int) -> Trial:
    """Make a clip of three colours, one frame a second, and ask for the colour at one end."""
    names = several(random.Random(f"{seed}/order"), COLOURED)
    frames = colour_frames([name for name in names for _ in range(PAIR)], side=side)
    return Trial(
        name=f"order/{seed}",
        question=f"<video>Which colour comes {end} in this video? Answer with the colour alone.",
        answer=names[0 if end == "first" else -1],
        clips=(Clip(frames=frames, times=tuple(float(at) for at in range(len(frames)))),),
    )


def shuffled(trial: Trial, *, seed: int) -> Trial:
    """Return the trial with its moments in another order; the two frames of a moment stay together, the times too."""
    draw = random.Random(f"{seed}/shuffle")
    clips = []
    for clip in trial.clips:
        moments = [clip.frames[at : at + PAIR] for at in range(0, len(clip.frames), PAIR)]
        mixed = list(moments)
        while mixed == moments:
            draw.shuffle(mixed)
        clips.append(replace(clip, frames=tuple(frame for moment in mixed for frame in moment)))
    return replace(trial, clips=tuple(clips))


def probe(speaker: Speaker, *, trials: int, seed: int, side: int) -> Iterator[Score]:
    """Yield the share of right answers to both questions, in the right order and shuffled."""
    for end in ENDS:
        asked = [order_trial(end, seed=number, side=side) for number in range(seed * 1000, seed * 1000 + trials)]
        mixed = [shuffled(trial, seed=number) for number, trial in enumerate(asked)]
        for column, shown in (("in order", asked), ("shuffled", mixed)):
            replies = answers(speaker, shown)
            right = sum(is_right(reply, trial.answer) for reply, trial in zip(replies, shown, strict=True))
            yield Score(row=f"{end} colour", column=column, value=right / trials, trials=trials)

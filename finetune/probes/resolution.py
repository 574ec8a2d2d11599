"""`resolution`: letters of several heights read from pictures that are shown with fewer and fewer pixels."""

from collections.abc import Iterator, Sequence

from finetune.ask.speaker import Speaker
from finetune.probes.letters import letter_trial
from finetune.probes.score import Score
from finetune.probes.trial import answers, is_right

SHARES = {"all pixels": 1.0, "1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
"""Pixels that a picture may have, as a share of its own; its sides then become multiples of a token's."""


def probe(speaker: Speaker, *, heights: Sequence[int], side: int, trials: int, seed: int) -> Iterator[Score]:
    """Yield the share of letters read, by their height in the picture and by the share of its pixels."""
    for height in heights:
        for column, share in SHARES.items():
            limit = round(share * side**2)
            shown = [
                letter_trial(height, side=side, seed=seed * 1000 + number, max_pixels=limit) for number in range(trials)
            ]
            replies = answers(speaker, shown)
            right = sum(is_right(reply, trial.answer) for reply, trial in zip(replies, shown, strict=True))
            yield Score(row=f"{height} px", column=column, value=right / trials, trials=trials)

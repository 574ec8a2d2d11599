"""`deepstack`: small letters read with all of the tower's levels, with none, and with each level alone."""

from collections.abc import Iterator, Sequence

from finetune.ask.speaker import Speaker
from finetune.probes.effects import deepstack_levels, level_count
from finetune.probes.letters import letter_trial
from finetune.probes.score import Score
from finetune.probes.trial import answers, is_right


def probe(speaker: Speaker, *, heights: Sequence[int], side: int, trials: int, seed: int) -> Iterator[Score]:
    """Yield the share of letters read, by their height in pixels and by the levels that are on."""
    levels = range(level_count(speaker))
    columns = {"on": tuple(levels), "off": ()} | {f"level {at + 1} alone": (at,) for at in levels}
    for height in heights:
        shown = [letter_trial(height, side=side, seed=seed * 1000 + number) for number in range(trials)]
        for column, kept in columns.items():
            with deepstack_levels(speaker, kept):
                replies = list(answers(speaker, shown))
            right = sum(is_right(reply, trial.answer) for reply, trial in zip(replies, shown, strict=True))
            yield Score(row=f"{height} px", column=column, value=right / trials, trials=trials)

"""Builds needles in haystacks from a seed and scores a model on them, by length and depth.

The needle is a fact in filler text, or one coloured moment in a grey video. The model finds it if each token of the
right answer is its first choice. This takes one forward per trial; nothing is generated. Haystacks are fitted to their
length with the model's own tokenizer and frame sizes.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.format.facts import ImageFacts
from data.render.sample import Renderer
from data.render.video import frame_list_facts
from finetune.ask.speaker import Speaker
from finetune.probes.colours import COLOURS, PAIR, colour_frames
from finetune.probes.trial import Clip, Trial

THINGS = ("harbour", "garden", "kettle", "ladder", "violin", "lantern", "bridge", "orchard", "compass", "mirror")
DOINGS = ("stood near the wall", "was painted again", "was sold in spring", "belonged to nobody", "stayed where it was")
FRAME = 64
"""Side of a video haystack's frames in pixels: 4 tokens."""

MARKS = 8
"""The most tokens that open and close an answer."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The scores of all trials of one length and depth."""

    length: int
    """The nominal length in tokens."""
    depth: float
    tokens: float
    """Mean length of the prompts in tokens."""
    found: float
    """Share of the trials in which every token of the answer was the model's first choice."""
    right_tokens: float
    """Share of the answers' tokens that were the model's first choice."""


def text_haystack(count: int, depth: float, *, seed: int) -> Trial:
    """Make a text of `count` sentences with a needle at `depth`; the answer is a number of four digits."""
    draw = random.Random(seed)
    thing, number = draw.choice(THINGS), f"{draw.randrange(1000, 10_000)}"
    filler = [f"The {draw.choice(THINGS)} {draw.choice(DOINGS)}." for _ in range(count)]
    filler.insert(round(depth * count), f"The secret number of the {thing} is {number}.")
    question = f"What is the secret number of the {thing}? Answer with the number alone."
    return Trial(question=" ".join(filler) + "\n" + question, answer=number)


def video_haystack(count: int, depth: float, *, seed: int) -> Trial:
    """Make a video of `count` grey frames, one per second, with one coloured pair; the answer is the colour's name."""
    name = random.Random(seed).choice(list(COLOURS))
    count += count % PAIR
    pair = PAIR * min(round(depth * (count // PAIR)), count // PAIR - 1)
    names = [name if at in (pair, pair + 1) else None for at in range(count)]
    clip = Clip(frames=colour_frames(names, side=FRAME), times=tuple(float(at) for at in range(count)))
    question = "<video>One moment of this video is not grey. Which colour is it? Answer with the colour alone."
    return Trial(question=question, answer=name, clips=(clip,))


def count_tokens(haystack: Trial, renderer: Renderer) -> int:
    """Count the tokens of a haystack with its answer and the marks around it, without its pixels."""
    record, size = haystack.record(), ImageFacts(height=FRAME, width=FRAME)
    videos = [
        frame_list_facts(ref, [size] * len(clip.frames))
        for ref, clip in zip(record.videos, haystack.clips, strict=True)
    ]
    vision = renderer.count_vision(record, [], videos)
    return renderer.count_text(record, [], videos) + vision.tokens + len(renderer.encode(haystack.answer)) + MARKS


def fitted(kind: str, length: int, depth: float, *, seed: int, renderer: Renderer) -> Trial:
    """Return the longest haystack that fits into `length` tokens."""
    make, high = (text_haystack, 64) if kind == "text" else (video_haystack, 20)
    low = 4
    few, many = (count_tokens(make(count, depth, seed=seed), renderer) for count in (low, high))
    tokens_each = (many - few) / (high - low)
    count = low + int((length - few) / tokens_each)
    while count >= low:
        haystack = make(count, depth, seed=seed)
        if count_tokens(haystack, renderer) <= length:
            return haystack
        count -= max(1, int((count_tokens(haystack, renderer) - length) / tokens_each))
    raise ValueError(
        f"--lengths: a {kind} needle does not fit in {length} tokens; the shortest haystack takes {few}. "
        f"Give longer lengths"
    )


def probe(
    speaker: Speaker,
    kind: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> Iterator[Cell]:
    """Yield the scores by length and depth."""
    for length in lengths:
        for depth in depths:
            yield _cell(speaker, kind, length, depth, trials, seed)


def _cell(speaker: Speaker, kind: str, length: int, depth: float, trials: int, seed: int) -> Cell:
    right_answers = right_tokens = answer_tokens = prompt_tokens = 0
    for trial_seed in range(seed * 1000, seed * 1000 + trials):
        haystack = fitted(kind, length, depth, seed=trial_seed, renderer=speaker.renderer)
        prompt, answer_ids = haystack.prompt(speaker.renderer), speaker.renderer.encode(haystack.answer)
        judged = speaker.judge(prompt, answer_ids)
        hits = [token.best_id == answer_id for token, answer_id in zip(judged, answer_ids, strict=True)]
        right_answers += all(hits)
        right_tokens += sum(hits)
        answer_tokens += len(hits)
        prompt_tokens += len(prompt.input_ids)
    return Cell(
        length=length,
        depth=depth,
        tokens=prompt_tokens / trials,
        found=right_answers / trials,
        right_tokens=right_tokens / answer_tokens,
    )

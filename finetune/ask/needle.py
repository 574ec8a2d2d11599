"""Builds needles in haystacks from a seed and scores a model on them, by length and depth.

The needle is a fact in filler text, or one coloured moment in a grey video. The model finds it if each token of the
right answer is its first choice. This takes one forward per trial; nothing is generated. Haystacks are fitted to their
length with the model's own tokenizer and frame sizes.
"""

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data.format.facts import ImageFacts
from data.format.record import Record, parse_record
from data.prepare.convert import convert_row
from data.render.sample import Renderer, Sample
from data.render.video import frame_list_facts
from finetune.ask.speaker import Speaker

THINGS = ("harbour", "garden", "kettle", "ladder", "violin", "lantern", "bridge", "orchard", "compass", "mirror")
DOINGS = ("stood near the wall", "was painted again", "was sold in spring", "belonged to nobody", "stayed where it was")
COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
FRAME = 64
"""Side of a video haystack's frames in pixels: 4 tokens."""

MARKS = 8
"""The most tokens that open and close an answer."""


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """A haystack with its needle: the question, the right answer, and the frames of the videos."""

    record: Record
    videos: tuple[tuple[bytes, ...], ...]
    answer: str


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


def text_haystack(count: int, depth: float, *, seed: int) -> Haystack:
    """Make a text of `count` sentences with a needle at `depth`; the answer is a number of four digits."""
    draw = random.Random(seed)
    thing, number = draw.choice(THINGS), f"{draw.randrange(1000, 10_000)}"
    filler = [f"The {draw.choice(THINGS)} {draw.choice(DOINGS)}." for _ in range(count)]
    filler.insert(round(depth * count), f"The secret number of the {thing} is {number}.")
    question = f"What is the secret number of the {thing}? Answer with the number alone."
    row = {"messages": [{"role": "user", "content": " ".join(filler) + "\n" + question}]}
    return Haystack(record=_record(row), videos=(), answer=number)


def video_haystack(count: int, depth: float, *, seed: int) -> Haystack:
    """Make a video of `count` grey frames, one per second, with one coloured pair; the answer is the colour's name."""
    draw = random.Random(seed)
    name, noise = draw.choice(list(COLOURS)), np.random.default_rng(seed)
    count += count % 2
    pair = 2 * min(round(depth * (count // 2)), count // 2 - 1)
    frames = []
    for at in range(count):
        pixels = noise.integers(110, 140, (FRAME, FRAME, 1), dtype=np.uint8).repeat(3, axis=2)
        if at in (pair, pair + 1):
            pixels[:] = COLOURS[name]
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        frames.append(png.getvalue())
    question = "<video>One moment of this video is not grey. Which colour is it? Answer with the colour alone."
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "videos": [{"frames": [f"{at}.png" for at in range(count)], "times": [float(at) for at in range(count)]}],
    }
    return Haystack(record=_record(row), videos=(tuple(frames),), answer=name)


def _record(row: dict[str, Any]) -> Record:
    return parse_record(convert_row(row)[0], shard="needle", key="trial")


def count_tokens(haystack: Haystack, renderer: Renderer) -> int:
    """Count the tokens of a haystack with its answer and the marks around it, without its pixels."""
    sizes = [ImageFacts(height=FRAME, width=FRAME)]
    videos = [
        frame_list_facts(ref, sizes * len(frames))
        for ref, frames in zip(haystack.record.videos, haystack.videos, strict=True)
    ]
    vision = renderer.count_vision(haystack.record, [], videos)
    text_tokens = renderer.count_text(haystack.record, [], videos)
    return text_tokens + vision.tokens + len(renderer.encode(haystack.answer)) + MARKS


def fitted(kind: str, length: int, depth: float, *, seed: int, renderer: Renderer) -> Haystack:
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


def prompt_of(haystack: Haystack, renderer: Renderer) -> Sample:
    """Return the prompt: the haystack, the question, and the opening of the answer's turn."""
    return renderer.build(haystack.record, [], list(haystack.videos), key="needle", prompt=True)


def probe(
    speaker: Speaker,
    kind: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
    base: bool = False,
) -> Iterator[Cell]:
    """Yield the scores by length and depth; with `base`, those of the model without its adapter."""
    for length in lengths:
        for depth in depths:
            alone: AbstractContextManager[None] = speaker.base_alone() if base else nullcontext()
            with alone:
                yield _cell(speaker, kind, length, depth, trials, seed)


def _cell(speaker: Speaker, kind: str, length: int, depth: float, trials: int, seed: int) -> Cell:
    right_answers = right_tokens = answer_tokens = prompt_tokens = 0
    for trial_seed in range(seed * 1000, seed * 1000 + trials):
        haystack = fitted(kind, length, depth, seed=trial_seed, renderer=speaker.renderer)
        prompt, answer_ids = prompt_of(haystack, speaker.renderer), speaker.renderer.encode(haystack.answer)
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

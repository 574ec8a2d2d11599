"""Needles in haystacks of a given length: a fact in filler text, or one coloured frame in a grey video. From a seed.

A model finds a needle when its own first choice is the right answer, token by token, given the question; one forward a
trial, nothing is generated. Haystacks are made to measure with the model's own tokenizer and frame sizes.
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
"""Side of a frame of a haystack of video, in pixels: 4 tokens."""

MARKS = 8
"""Tokens that open and close an answer, at most."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One haystack with its needle: what is asked, what is right, and the media that go with it."""

    record: Record
    videos: tuple[tuple[bytes, ...], ...]
    answer: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All trials of one length and depth."""

    length: int
    """Tokens that were asked for."""
    depth: float
    tokens: float
    """Mean tokens of the prompts that were made."""
    found: float
    """Share of the trials in which the whole answer was the model's first choice."""
    right_tokens: float
    """Share of the answers' tokens that were."""


def text_trial(count: int, depth: float, *, seed: int) -> Trial:
    """A needle behind `depth` of `count` sentences; the answer is a number of four digits."""
    draw = random.Random(seed)
    thing, number = draw.choice(THINGS), f"{draw.randrange(1000, 10_000)}"
    filler = [f"The {draw.choice(THINGS)} {draw.choice(DOINGS)}." for _ in range(count)]
    filler.insert(round(depth * count), f"The secret number of the {thing} is {number}.")
    question = f"What is the secret number of the {thing}? Answer with the number alone."
    row = {"messages": [{"role": "user", "content": " ".join(filler) + "\n" + question}]}
    return Trial(record=_record(row), videos=(), answer=number)


def video_trial(count: int, depth: float, *, seed: int) -> Trial:
    """A video of `count` grey frames, a second each, two of which (one pair) show a colour; the answer is its name."""
    draw = random.Random(seed)
    name, noise = draw.choice(list(COLOURS)), np.random.default_rng(seed)
    count += count % 2
    pair = 2 * min(round(depth * (count // 2)), count // 2 - 1)
    frames = []
    for at in range(count):
        pixels = noise.integers(110, 140, (FRAME, FRAME, 1), dtype=np.uint8).repeat(3, axis=2)
        if at in (pair, pair + 1):
            pixels[:] = COLOURS[name]
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "PNG")
        frames.append(held.getvalue())
    question = "<video>One moment of this video is not grey. Which colour is it? Answer with the colour alone."
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "videos": [{"frames": [f"{at}.png" for at in range(count)], "times": [float(at) for at in range(count)]}],
    }
    return Trial(record=_record(row), videos=(tuple(frames),), answer=name)


def _record(row: dict[str, Any]) -> Record:
    return parse_record(convert_row(row)[0], shard="needle", key="trial")


def count_tokens(trial: Trial, renderer: Renderer) -> int:
    """Tokens of a trial with its answer and the marks around it; no pixel is looked at."""
    sizes = [ImageFacts(height=FRAME, width=FRAME)]
    videos = [
        frame_list_facts(ref, sizes * len(frames))
        for ref, frames in zip(trial.record.videos, trial.videos, strict=True)
    ]
    seen = renderer.count_vision(trial.record, [], videos)
    return renderer.count_text(trial.record, [], videos) + seen.tokens + len(renderer.encode(trial.answer)) + MARKS


def fitted(kind: str, length: int, depth: float, *, seed: int, renderer: Renderer) -> Trial:
    """The trial whose haystack is as long as fits into `length` tokens."""
    make, low, high = (text_trial, 4, 64) if kind == "text" else (video_trial, 4, 20)
    few, many = (count_tokens(make(count, depth, seed=seed), renderer) for count in (low, high))
    each = (many - few) / (high - low)
    count = low + int((length - few) / each)
    while count >= low:
        trial = make(count, depth, seed=seed)
        if count_tokens(trial, renderer) <= length:
            return trial
        count -= max(1, int((count_tokens(trial, renderer) - length) / each))
    raise ValueError(
        f"--lengths: a {kind} needle does not fit {length} tokens; the shortest haystack here takes {few}. "
        f"Name longer ones"
    )


def prompt_of(trial: Trial, renderer: Renderer) -> Sample:
    """What the model is given: the haystack, the question, and the answer's turn opened."""
    return renderer.build(trial.record, [], list(trial.videos), key="needle", prompt=True)


def probe(
    speaker: Speaker, kind: str, *, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int,
    base: bool = False,
) -> Iterator[Cell]:  # fmt: skip
    """Yield what was found, by length and depth; with `base`, by the model without its adapter."""
    for length in lengths:
        for depth in depths:
            alone: AbstractContextManager[None] = speaker.base_alone() if base else nullcontext()
            with alone:
                yield _cell(speaker, kind, length, depth, trials, seed)


def _cell(speaker: Speaker, kind: str, length: int, depth: float, trials: int, seed: int) -> Cell:
    whole = right = answers = tokens = 0
    for trial_seed in range(seed * 1000, seed * 1000 + trials):
        trial = fitted(kind, length, depth, seed=trial_seed, renderer=speaker.renderer)
        prompt, wanted = prompt_of(trial, speaker.renderer), speaker.renderer.encode(trial.answer)
        judged = speaker.judge(prompt, wanted)
        hits = [token.best_id == want for token, want in zip(judged, wanted, strict=True)]
        whole, right, answers = whole + all(hits), right + sum(hits), answers + len(hits)
        tokens += len(prompt.input_ids)
    return Cell(length=length, depth=depth, tokens=tokens / trials, found=whole / trials, right_tokens=right / answers)

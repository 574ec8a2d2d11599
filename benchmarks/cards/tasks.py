"""The tasks of the cards, and what their base is trained on before; every question is made from its number."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from finetune.probes.colours import COLOURS, png
from finetune.probes.letters import LETTERS, letter_trial
from finetune.probes.timestamps import time_trial
from finetune.probes.trial import Trial

SIDE = 64
"""Side of a picture in pixels: 4 tokens."""
FRAME = 32
HELD_OUT = 60
"""Questions of a score: the numbers below this one. Training has others."""
GREY = (125, 125, 125)
DIGITS = "0123456789"
NAMES = ("harbour", "garden", "kettle", "ladder", "violin", "lantern", "bridge", "orchard")

Draw = Callable[[int], Trial]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task that a LoRA learns on top of a base."""

    name: str
    draw: Draw
    metric: str
    about: str


def digit(number: int) -> Trial:
    """Ask for one of scikit-learn's handwritten digits; no digit is both held out and trained on."""
    digits = _digits()
    at = number if number < HELD_OUT else HELD_OUT + number % (len(digits.images) - HELD_OUT)
    cells = (digits.images[at] * 15.9375).astype("uint8")
    image = Image.fromarray(cells.repeat(8, 0).repeat(8, 1)).convert("RGB")
    return Trial(
        name=f"digit/{number}", question="<image>What is it?", answer=str(digits.target[at]), images=(png(image),)
    )


@cache
def _digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()


def box(number: int) -> Trial:
    """Ask for the box of a coloured square, on a grid of a quarter of the picture's side."""
    draw = random.Random(f"{number}/box")
    left, top = draw.randrange(4), draw.randrange(4)
    corners = [250 * left, 250 * top, 250 * (left + 1), 250 * (top + 1)]
    name = draw.choice(list(COLOURS))
    pixels = [round(corner * SIDE / 1000) for corner in corners]
    return Trial(
        name=f"box/{number}",
        question=f"<image>Where is the {name} square? Answer with its box.",
        answer=str(corners),
        images=(png(_with_square(pixels, COLOURS[name])),),
    )


def place(number: int) -> Trial:
    """Ask for the cell of a coloured square: for the base, so that it can tell places."""
    draw = random.Random(f"{number}/place")
    left, top = draw.randrange(4), draw.randrange(4)
    name = draw.choice(list(COLOURS))
    pixels = [16 * left, 16 * top, 16 * left + 16, 16 * top + 16]
    return Trial(
        name=f"place/{number}",
        question=f"<image>Where is the {name} square?",
        answer=f"row {top}, column {left}",
        images=(png(_with_square(pixels, COLOURS[name])),),
    )


def document(number: int) -> Trial:
    """Show a rendered form with a letter and a digit, and ask for both fields as JSON."""
    draw = random.Random(f"{number}/document")
    letter, amount = draw.choice(LETTERS), draw.choice(DIGITS)
    image = Image.new("RGB", (SIDE, SIDE), GREY)
    pen = ImageDraw.Draw(image)
    for text, middle in ((letter, 16), (amount, 48)):
        pen.text((32, middle), text, fill="white", font=ImageFont.load_default(size=30), anchor="mm")
    return Trial(
        name=f"document/{number}",
        question="<image>Read the form.",
        answer=json.dumps({"name": letter, "total": int(amount)}),
        images=(png(image),),
    )


def comparison(number: int) -> Trial:
    """Show two pictures with a letter each, and ask whether the letter is the same."""
    draw = random.Random(f"{number}/comparison")
    first = letter_trial(24, side=SIDE, seed=draw.randrange(10**9))
    other = first
    while (other.answer == first.answer) != (number % 2 == 0) or other is first:
        other = letter_trial(24, side=SIDE, seed=draw.randrange(10**9))
    return Trial(
        name=f"comparison/{number}",
        question="<image><image>Do both show the same letter?",
        answer="yes" if number % 2 == 0 else "no",
        images=(*first.images, *other.images),
    )


def clip(number: int) -> Trial:
    """Ask when a colour is shown in a clip with a frame every two seconds."""
    return time_trial("when", 0.5, "seconds", seed=number, side=FRAME)


def faster_clip(number: int) -> Trial:
    """Ask the same of a clip with a frame every second: for the base."""
    return time_trial("when", 1.0, "seconds", seed=number, side=FRAME)


def text(number: int) -> Trial:
    """Ask a question of text alone: the code of a thing, which only training can tell."""
    thing = NAMES[number % len(NAMES)]
    colour = list(COLOURS)[NAMES.index(thing) % len(COLOURS)]
    filler = random.Random(f"{number}/text").choice(NAMES)
    return Trial(
        name=f"text/{number}",
        question=f"The {filler} stood near the wall. Which colour has the {thing}?",
        answer=colour,
    )


def echo(number: int) -> Trial:
    """Ask to repeat a box or a JSON object: for the base, so that it can write these forms."""
    made = box(number).answer if number % 2 else document(number).answer
    return Trial(name=f"echo/{number}", question=f"Repeat {made}", answer=made)


def letter(number: int) -> Trial:
    """Ask for the letter in a picture: for the base, and to see what an adapter makes it forget."""
    return letter_trial(random.Random(f"{number}/height").randint(18, 28), side=SIDE, seed=number)


def _with_square(corners: Sequence[int], colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), GREY)
    ImageDraw.Draw(image).rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=colour)
    return image


BASE: Sequence[Draw] = (letter, place, echo, faster_clip)
"""Questions that a base is trained on, in turn."""
KEPT: Draw = letter
"""Questions that are asked again with each adapter, to see what it forgets."""
TASKS = (
    Task(name="digits", draw=digit, metric="exact", about="handwritten digits"),
    Task(name="boxes", draw=box, metric="iou@0.5", about="the box of a square of a given colour"),
    Task(name="documents", draw=document, metric="json-field-f1", about="a rendered form to JSON"),
    Task(name="several images", draw=comparison, metric="exact", about="two pictures: the same letter?"),
    Task(
        name="clips", draw=clip, metric="time-iou", about="when a colour is shown, at half the rate that the base saw"
    ),
    Task(name="text", draw=text, metric="exact", about="facts, with letters as the guard of what is forgotten"),
)

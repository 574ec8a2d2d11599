"""Draws pictures with one small letter from a seed: the detail that `deepstack` and `resolution` ask for."""

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.probes.colours import png
from finetune.probes.trial import Trial

LETTERS = "ACEHKLTX"
QUESTION = "<image>Which letter is in the middle? Answer with the letter alone."
JITTER = 1
"""How far a letter may lie from the middle, in pixels, in both directions."""


def letter_trial(height: int, *, side: int, seed: int, max_pixels: int | None = None) -> Trial:
    """Make a grey, noisy picture of `side` x `side` pixels with a white letter `height` pixels high in its middle."""
    draw = random.Random(f"{seed}/letter")
    letter = draw.choice(LETTERS)
    noise = np.random.default_rng(seed).integers(118, 138, (side, side, 1), dtype=np.uint8).repeat(3, axis=2)
    image = Image.fromarray(noise)
    middle = (side // 2 + draw.randint(-JITTER, JITTER), side // 2 + draw.randint(-JITTER, JITTER))
    pen = ImageDraw.Draw(image)
    pen.text(middle, letter, fill="white", font=_font(height), anchor="mm")
    return Trial(name=f"letter/{seed}", question=QUESTION, answer=letter, images=(png(image),), max_pixels=max_pixels)


def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font whose capitals are about this many pixels high."""
    return ImageFont.load_default(size=height / 0.72)

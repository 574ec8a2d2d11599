"""Draws frames of plain colours."""

import io
import random
from collections.abc import Sequence

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
GREY = (125, 125, 125)
PAIR = 2
"""Frames that the tower sees as one."""


def colour_frames(names: Sequence[str | None], *, side: int) -> tuple[bytes, ...]:
    """Return one PNG for each name of a colour; None is a grey frame."""
    colours = [GREY if name is None else COLOURS[name] for name in names]
    drawn = {colour: png(Image.new("RGB", (side, side), colour)) for colour in set(colours)}
    return tuple(drawn[colour] for colour in colours)


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def several(draw: random.Random, count: int) -> list[str]:
    """Draw `count` different colours."""
    return draw.sample(list(COLOURS), count)

"""Draws scores by length and depth as a picture, with one grid for each model. Uses Pillow."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

CELL = (72, 36)
LEFT, TOP = 64, 46
GAP = 40
BELOW = 30
"""Pixels: the size of a cell, the margins left of and above the cells, between grids, and below the cells."""


def draw_heatmap(
    grids: Mapping[str, Sequence[Sequence[float]]],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    title: str,
    path: Path,
) -> None:
    """Write the PNG; a grid has a row for each depth and a column for each length, scores from 0 (red) to 1 (green)."""
    wide, high = LEFT + CELL[0] * len(lengths) + GAP, TOP + CELL[1] * len(depths) + BELOW
    image = Image.new("RGB", (wide * len(grids), high), "white")
    pen = ImageDraw.Draw(image)
    for number, (name, rows) in enumerate(grids.items()):
        left = wide * number
        pen.text((left + 6, 6), f"{title}: {name}", fill="black")
        pen.text((left + 6, TOP - 16), "depth", fill="black")
        for y, (depth, row) in enumerate(zip(depths, rows, strict=True)):
            top = TOP + CELL[1] * y
            pen.text((left + 6, top + CELL[1] // 2 - 6), f"{depth:.0%}", fill="black")
            for x, score in enumerate(row):
                corner = (left + LEFT + CELL[0] * x, top)
                pen.rectangle((*corner, corner[0] + CELL[0] - 2, corner[1] + CELL[1] - 2), fill=colour(score))
                pen.text((corner[0] + CELL[0] // 2 - 12, top + CELL[1] // 2 - 6), f"{score:.2f}", fill="black")
        for x, length in enumerate(lengths):
            pen.text((left + LEFT + CELL[0] * x + 8, high - BELOW + 8), f"{length:,}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def colour(score: float) -> tuple[int, int, int]:
    """Return red for 0, yellow for a half, green for 1."""
    share = min(1.0, max(0.0, score))
    return (round(230 * min(1.0, 2 - 2 * share)), round(200 * min(1.0, 2 * share)), 60)

"""Draws grids of numbers as a picture, one grid for each model or kind. Uses Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

CELL = (76, 36)
SMALL = (12, 12)
LEFT, TOP = 160, 46
GAP = 40
BELOW = 30
"""Pixels: the sizes of a cell with a number and of one without, the margins left of and above the cells, right of
them, and below."""
LETTER = 6
MARGIN = 10
"""Pixels: the width of a letter, and what is left free beside a name."""
MANY = 16
"""Columns from which on cells are small and carry no number."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Numbers by row and column, from 0 (red) over `top` / 2 (yellow) to `top` and above (green)."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    top: float = 1.0

    @property
    def cell(self) -> tuple[int, int]:
        """The size of a cell: wide enough for the names of the columns, or small if there are many."""
        if len(self.columns) >= MANY:
            return SMALL
        return max(CELL[0], MARGIN + LETTER * max(map(len, self.columns))), CELL[1]


def draw_grids(grids: Sequence[Grid], path: Path) -> None:
    """Write the PNG: the grids side by side, or one below the other if they have many columns."""
    sizes = [
        (LEFT + grid.cell[0] * len(grid.columns) + GAP, TOP + grid.cell[1] * len(grid.rows) + BELOW) for grid in grids
    ]
    wides, highs = zip(*sizes, strict=True)
    stacked = any(grid.cell == SMALL for grid in grids)
    size = (max(wides), sum(highs)) if stacked else (sum(wides), max(highs))
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    corner = (0, 0)
    for grid, (wide, high) in zip(grids, sizes, strict=True):
        _draw(pen, grid, corner)
        corner = (0, corner[1] + high) if stacked else (corner[0] + wide, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _draw(pen: ImageDraw.ImageDraw, grid: Grid, corner: tuple[int, int]) -> None:
    wide, high = grid.cell
    left, above = corner[0] + LEFT, corner[1] + TOP
    pen.text((corner[0] + 6, corner[1] + 6), grid.title, fill="black")
    for y, (name, values) in enumerate(zip(grid.rows, grid.values, strict=True)):
        top = above + high * y
        pen.text((corner[0] + 6, top + high // 2 - 6), name, fill="black")
        for x, value in enumerate(values):
            at = left + wide * x
            pen.rectangle((at, top, at + wide - 2, top + high - 2), fill=colour(value / grid.top))
            if grid.cell != SMALL:
                pen.text((at + wide // 2 - 12, top + high // 2 - 6), f"{value:.2f}", fill="black")
    if grid.cell != SMALL:
        for x, name in enumerate(grid.columns):
            pen.text((left + wide * x + 2, above - 16), name, fill="black")


def colour(share: float) -> tuple[int, int, int]:
    """Return red for 0, yellow for a half, green for 1."""
    share = min(1.0, max(0.0, share))
    return (round(230 * min(1.0, 2 - 2 * share)), round(200 * min(1.0, 2 * share)), 60)

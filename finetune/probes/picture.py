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
"""Pixels: the sizes of a cell with a number and of one without, the margins left of and above the cells, between grids,
and below the cells."""
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
    """Write the PNG, with the grids side by side."""
    wides = [LEFT + grid.cell[0] * len(grid.columns) + GAP for grid in grids]
    high = max(TOP + grid.cell[1] * len(grid.rows) for grid in grids) + BELOW
    image = Image.new("RGB", (sum(wides), high), "white")
    pen = ImageDraw.Draw(image)
    left = 0
    for grid, wide in zip(grids, wides, strict=True):
        _draw(pen, grid, left)
        left += wide
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _draw(pen: ImageDraw.ImageDraw, grid: Grid, left: int) -> None:
    wide, high = grid.cell
    pen.text((left + 6, 6), grid.title, fill="black")
    for y, (name, values) in enumerate(zip(grid.rows, grid.values, strict=True)):
        top = TOP + high * y
        pen.text((left + 6, top + high // 2 - 6), name, fill="black")
        for x, value in enumerate(values):
            corner = (left + LEFT + wide * x, top)
            pen.rectangle((*corner, corner[0] + wide - 2, corner[1] + high - 2), fill=colour(value / grid.top))
            if grid.cell != SMALL:
                pen.text((corner[0] + wide // 2 - 12, top + high // 2 - 6), f"{value:.2f}", fill="black")
    if grid.cell != SMALL:
        for x, name in enumerate(grid.columns):
            pen.text((left + LEFT + wide * x + 2, TOP - 16), name, fill="black")


def colour(share: float) -> tuple[int, int, int]:
    """Return red for 0, yellow for a half, green for 1."""
    share = min(1.0, max(0.0, share))
    return (round(230 * min(1.0, 2 - 2 * share)), round(200 * min(1.0, 2 * share)), 60)

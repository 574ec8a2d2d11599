"""One score of a probe, by row and column, and scores as the lines of a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Score:
    """One cell of a probe's table. `value` is from 0 to 1, the mean over `trials`."""

    row: str
    column: str
    value: float
    trials: int


def grid(scores: Sequence[Score]) -> tuple[list[str], list[str], list[list[float]]]:
    """Return the names of rows and columns in the order in which they come, and the values."""
    rows, columns = _names(score.row for score in scores), _names(score.column for score in scores)
    values = {(score.row, score.column): score.value for score in scores}
    return rows, columns, [[values[row, column] for column in columns] for row in rows]


def table(scores: Sequence[Score]) -> list[str]:
    """Return the lines of a table for a terminal."""
    rows, columns, values = grid(scores)
    first = max(map(len, rows))
    wides = [max(4, len(column)) for column in columns]
    lines = [" " * first + "".join(f"  {name:>{wide}}" for name, wide in zip(columns, wides, strict=True))]
    for row, numbers in zip(rows, values, strict=True):
        lines.append(
            f"{row:<{first}}" + "".join(f"  {number:>{wide}.2f}" for number, wide in zip(numbers, wides, strict=True))
        )
    return lines


def _names(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))

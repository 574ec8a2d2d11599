"""Says which shape rows have, from the first of them. No torch."""

from collections.abc import Mapping
from itertools import islice

from data.rows.columns import nearest, with_lists
from data.rows.files import RowSource, read_source
from data.rows.shapes import is_known, recognised, shape_of

LOOKED_AT = 8
"""Rows that are looked at."""


def recognise(source: RowSource) -> str:
    """Return the shape of the first rows, with its columns.

    ValueError if none of them has a known shape, or `map` names a column that none has. All else that is wrong with a
    row is left to the build, which lists such rows.
    """
    rows = [row for _, row, _ in islice(read_source(source), LOOKED_AT) if isinstance(row, Mapping)]
    if unknown := source.columns.unknown(rows):
        columns = sorted({str(name) for row in rows for name in row})
        raise ValueError(
            f"`map` names the column {unknown[0]!r}, which the first rows do not have{nearest(unknown[0], columns)} "
            f"(they have {', '.join(columns)})"
        )
    ready = [with_lists(source.columns.apply(row)) for row in rows]
    known = [row for row in ready if is_known(row)]
    if ready and not known:
        shape_of(ready[0])  # raises, and says what is known
    return recognised(known) or "nothing: the first rows are no objects"

"""Positions of one sample's tokens, before packing. They follow the model's own rule.

There are four rows. Row 0 counts tokens and restarts with every sample; this separates packed samples in attention.
Rows 1 to 3 are the rotary positions in time, height and width. Text advances all three together. An image, or one
frame pair of a video, spreads over height and width from the current position; the text continues after its longer
side.
"""

from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]

TEXT = 0
IMAGE = 1
VIDEO = 2


def sample_positions(kinds_T: IntArray, *, image_grids: IntArray, video_grids: IntArray, merge: int) -> IntArray:
    """Return int32 [4, T] for each token's kind (TEXT, IMAGE, VIDEO) and the patch grids in order of appearance."""
    frames = np.repeat(video_grids, video_grids[:, 0], axis=0)
    grids = {IMAGE: iter(image_grids[:, 1:] // merge), VIDEO: iter(frames[:, 1:] // merge)}
    positions = np.empty((4, len(kinds_T)), dtype=np.int32)
    positions[0] = np.arange(len(kinds_T))
    borders = [0, *(np.flatnonzero(np.diff(kinds_T)) + 1).tolist(), len(kinds_T)]
    here = 0
    for first, end in zip(borders, borders[1:], strict=False):
        if first == end:
            break  # no tokens at all
        kind = int(kinds_T[first])
        if kind == TEXT:
            positions[1:, first:end] = here + np.arange(end - first)
            here += end - first
            continue
        rows, columns = (int(side) for side in next(grids[kind]))
        assert end - first == rows * columns, f"{end - first} vision tokens for a grid of {rows} x {columns}"
        positions[1, first:end] = here
        positions[2, first:end] = here + np.repeat(np.arange(rows), columns)
        positions[3, first:end] = here + np.tile(np.arange(columns), rows)
        here += max(rows, columns)
    assert all(next(left, None) is None for left in grids.values()), "a grid without tokens"
    return positions

"""Build packed rows of plain text, without images and videos, and steps of such rows."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from data.render.sample import Sample
from data.stream.batch import Batch, LossSums, Step, collate, loss_sums

WIDTHS = (768, 1536)
"""Values in one patch of an image and of a video; needed for the empty patch arrays of a text row."""


def text_row(ids: Sequence[Tensor], weights: Sequence[Tensor]) -> Batch:
    """Pack samples, given by tokens and loss weights, into one row without padding; first tokens carry no loss."""
    samples = [_sample(*pair) for pair in zip(ids, weights, strict=True)]
    keys = [f"s/{number}" for number in range(len(samples))]
    return collate(samples, keys=keys, pad_id=0, multiple=1, widths=WIDTHS)


def useful(rows: Sequence[Batch]) -> int:
    """Return the number of tokens that are not padding."""
    return sum(int((row.sample_ids >= 0).sum()) for row in rows)


def step_of(rows: Sequence[Batch], number: int) -> Step:
    """Return one optimiser step of these rows, as the stream yields it."""
    return Step(
        epoch=0,
        step=number,
        batches=tuple(rows),
        sums=sum(map(loss_sums, rows), LossSums()),
        bad=(),
        notes=(),
        tokens=useful(rows),
        images=0,
        video_seconds=0.0,
        wait_seconds=0.0,
    )


def _sample(ids_T: Tensor, weights_T: Tensor) -> Sample:
    no_grids = np.empty((0, 3), dtype=np.int32)
    image_patches, video_patches = (np.empty((0, width), dtype=np.uint8) for width in WIDTHS)
    return Sample(
        key="",
        input_ids=ids_T.cpu().numpy().astype(np.int32),
        loss_weights=weights_T.cpu().numpy().astype(np.float32),
        positions=np.tile(np.arange(len(ids_T), dtype=np.int32), (4, 1)),
        image_patches=image_patches,
        image_grids=no_grids,
        video_patches=video_patches,
        video_grids=no_grids,
    )

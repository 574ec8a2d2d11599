"""Pictures out of a batch, as the model sees them: patches put together again."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from data.batch import Batch
from data.vision import Pixels, VisionSpec


def unpatch(patches: Tensor, *, grid: tuple[int, int, int], spec: VisionSpec) -> Pixels:
    """Return the first frame behind the patch rows of an image or video, [H, W, 3]."""
    _, rows, columns = grid
    merge, side = spec.merge, spec.patch
    frame = patches[: rows * columns].reshape(rows * columns, -1, side, side, 3)[:, 0]
    blocks = frame.reshape(rows // merge, columns // merge, merge, merge, side, side, 3)
    pixels: Pixels = np.ascontiguousarray(
        blocks.permute(0, 2, 4, 1, 3, 5, 6).reshape(rows * side, columns * side, 3).numpy()
    )
    return pixels


def pictures(batch: Batch, spec: VisionSpec) -> Iterator[Pixels]:
    """Yield each image of a row, then the first frame of each of its videos."""
    for patches, grids in ((batch.image_patches, batch.image_grids), (batch.video_patches, batch.video_grids)):
        begin = 0
        for time, rows, columns in grids.tolist():
            end = begin + time * rows * columns
            yield unpatch(patches[begin:end], grid=(time, rows, columns), spec=spec)
            begin = end

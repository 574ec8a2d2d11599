"""A few samples of a run's first step as the model sees them: their text with the supervised part, their pictures."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from torch import Tensor

from data.render.sample import Renderer
from data.render.vision import Pixels, VisionSpec, unpatch
from data.stream.batch import Batch

PARTS = 40
"""The most parts of a sample's text that are kept."""
PART_CHARACTERS = 2000
"""The most characters of a part that are kept; the number of those left out is written in their place."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The patches of an image, or of the first frames of a video, and the number of their rows and columns."""

    patches: Tensor
    rows: int
    columns: int
    spec: VisionSpec

    def pixels(self) -> Pixels:
        """Return the image, or the first frame, as pixels."""
        pixels: Pixels = unpatch(self.patches.numpy(), (1, self.rows, self.columns), self.spec)[0]
        return pixels


@dataclass(frozen=True, kw_only=True)
class SeenSample:
    """One sample of a row: its tokens, and a frame of each of its images and videos."""

    key: str
    ids_T: Tensor
    weights_T: Tensor
    frames: tuple[Frame, ...]

    @property
    def source(self) -> str:
        """The source of the sample, by the name that the run gave it."""
        return self.key.partition("/")[0]

    def record(self, renderer: Renderer) -> dict[str, object]:
        """Return the sample as it is written, without its pictures."""
        parts = renderer.spelled(self.ids_T.tolist(), self.weights_T.tolist())
        left_out = [(f" ... {len(parts) - PARTS} more parts", False)] if len(parts) > PARTS else []
        return {
            "key": self.key,
            "source": self.source,
            "tokens": len(self.ids_T),
            "supervised": int((self.weights_T > 0).sum()),
            "parts": [[_shortened(text), is_supervised] for text, is_supervised in [*parts[:PARTS], *left_out]],
        }


def chosen_samples(
    batches: Iterable[Batch], spec: VisionSpec | None, *, media_ids: Sequence[int], most: int
) -> list[SeenSample]:
    """Return up to `most` samples: one of each source in turn, those with pictures first.

    `media_ids` are the tokens that stand for patches of images, and of videos.
    """
    samples = sorted(
        (sample for batch in batches for sample in _samples(batch, spec, media_ids)),
        key=lambda sample: (sample.source, not sample.frames),
    )
    turns = [pair for _, group in groupby(samples, attrgetter("source")) for pair in enumerate(group)]
    return [sample for _, sample in sorted(turns, key=lambda pair: pair[0])][:most]


def _samples(batch: Batch, spec: VisionSpec | None, media_ids: Sequence[int]) -> Iterator[SeenSample]:
    kinds = []
    if spec is not None:
        media = ((batch.image_patches, batch.image_grids), (batch.video_patches, batch.video_grids))
        kinds = [_frames(patches, grids, spec) for patches, grids in media]
    cuts = batch.cu_seq_lens.tolist()
    for number, key in enumerate(batch.keys):
        own = slice(cuts[number], cuts[number + 1])
        ids_T = batch.input_ids[0, own]
        frames: list[Frame] = []
        for media_id, coming in zip(media_ids, kinds, strict=False):
            missing = int((ids_T == media_id).sum())
            while missing > 0 and (pair := next(coming, None)):
                missing -= pair[0]
                frames.append(pair[1])
        yield SeenSample(key=key, ids_T=ids_T, weights_T=batch.loss_weights[0, own], frames=tuple(frames))


def _frames(patches: Tensor, grids: Tensor, spec: VisionSpec) -> Iterator[tuple[int, Frame]]:
    """Yield the tokens of each image or video of a row, and its first frame."""
    begin = 0
    for time, rows, columns in grids.tolist():
        yield (
            time * rows * columns // spec.merge**2,
            Frame(patches=patches[begin : begin + rows * columns], rows=rows, columns=columns, spec=spec),
        )
        begin += time * rows * columns


def _shortened(text: str) -> str:
    """Return a text with its middle left out if it is long."""
    more = len(text) - PART_CHARACTERS
    if more <= 0:
        return text
    half = PART_CHARACTERS // 2
    return f"{text[:half]} ... {more:,} more characters ... {text[-half:]}"

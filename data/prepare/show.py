"""Shows a sample as a model sees it: its text with the supervised part marked, its images and frames on a sheet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from data.config import VideoConfig
from data.format.record import Record
from data.render.sample import Sample
from data.render.spelled import spelled_parts
from data.render.video import plan_video
from data.render.vision import read_spec, unpatch
from data.shards.index import ShardIndex

_TILE = 224
_LABEL = 14


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A picture of the sheet: pixels as the model gets them, boxes as fractions of its sides."""

    label: str
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    boxes: tuple[tuple[float, ...], ...] = ()


def marked_text(sample: Sample, base: Path, *, before: str = "⟦", after: str = "⟧") -> str:
    """Return the row's text with marks around what carries loss; runs of placeholders are counted.

    A control token or mark that is only spelled in a text has a backslash before it.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    parts = spelled_parts(sample.input_ids, sample.loss_weights, tokenizer, marks=(before, after))
    return "".join(f"{before}{text}{after}" if is_supervised else text for text, is_supervised in parts)


def sample_tiles(
    sample: Sample, record: Record, index: ShardIndex, number: int, *, base: Path, video: VideoConfig
) -> Iterator[Tile]:
    """Yield images with their boxes, then frames with their timestamps."""
    spec = read_spec(base)
    facts = index.images(number)
    at = 0
    for image, grid in enumerate(sample.image_grids):
        size = int(grid.prod())
        pixels = unpatch(sample.image_patches[at : at + size], grid, spec)[0]
        at += size
        width, height = facts[image].width, facts[image].height
        label = f"image {image + 1}: {width}x{height} -> {pixels.shape[1]}x{pixels.shape[0]}"
        yield Tile(label=label, pixels=pixels, boxes=_boxes(record, image, width, height))
    at = 0
    for clip, grid in enumerate(sample.video_grids):
        size = int(grid.prod())
        frames = unpatch(sample.video_patches[at : at + size], grid, spec)
        at += size
        plan = plan_video(record.videos[clip], index.videos(number)[clip], spec=spec, config=video)
        for frame, pixels in enumerate(frames):
            stamp = plan.stamps[frame // spec.temporal]
            yield Tile(label=f"video {clip + 1} frame {frame}: <{stamp:.1f} s>", pixels=pixels)


def _boxes(record: Record, image: int, width: int, height: int) -> tuple[tuple[float, ...], ...]:
    objects = record.objects
    if objects is None:
        return ()
    owners = objects.image_id or (0,) * len(objects.boxes)
    scale = {"real": (width, height), "norm1": (1, 1), "norm1000": (1000, 1000)}[objects.bbox_type]
    boxes = [box for box, owner in zip(objects.boxes, owners, strict=True) if owner == image]
    return tuple(tuple(value / scale[at % 2] for at, value in enumerate(box)) for box in boxes)


def contact_sheet(tiles: Sequence[Tile], columns: int = 4) -> Image.Image:
    """Draw all tiles on one picture, each with its label."""
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * _TILE, max(1, rows) * (_TILE + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        left, top = number % columns * _TILE, number // columns * (_TILE + _LABEL)
        draw.text((left + 2, top), tile.label, fill="black")
        picture = Image.fromarray(tile.pixels)
        pen = ImageDraw.Draw(picture)
        for box in tile.boxes:
            at = [value * picture.size[side % 2] for side, value in enumerate(box)]
            if len(at) == 4:
                pen.rectangle(at, outline="red", width=max(1, max(picture.size) // 150))
            else:
                reach = max(2, max(picture.size) // 60)
                pen.ellipse([at[0] - reach, at[1] - reach, at[0] + reach, at[1] + reach], fill="red")
        picture.thumbnail((_TILE - 4, _TILE - 4))
        sheet.paste(picture, (left + 2, top + _LABEL))
    return sheet

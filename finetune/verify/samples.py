"""The samples on which a base model is tested: text, an image, and short videos in each layout, drawn here.

Each video shows one simple event, so that a trained model finds the given answer likely, and most likely in the layout
that it was trained with.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.config import ChatConfig, ImageConfig, VideoConfig
from data.format.record import Record, parse_record
from data.render.sample import Renderer, Sample

VideoLayout = Literal["nested", "flat"]
LAYOUTS: tuple[VideoLayout, ...] = ("nested", "flat")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_RED = (200, 30, 30)
_BLUE = (30, 60, 200)
_GREEN = (30, 160, 60)
_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
_TIMES = tuple(float(second) for second in range(8))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One test sample: its name, the record that it was made from, and for a video the layout of its text."""

    name: str
    record: Record
    sample: Sample
    layout: VideoLayout | None = None


def trials(folder: Path) -> list[Trial]:
    """Return text, image, and every video in every layout, rendered by `data.render` with the base's own files."""
    renderers = {layout: _renderer(folder, layout) for layout in LAYOUTS}
    samples = []
    for name, raw, images in _STILLS:
        with_images = raw | {"images": [f"{at}.png" for at in range(len(images))]}
        record = parse_record(with_images, shard="", key=name)
        sample = renderers["nested"].build(record, [_png(picture) for picture in images], [], key=name)
        samples.append(Trial(name=name, record=record, sample=sample))
    for layout in LAYOUTS:
        for name, question, answer, frames in _VIDEOS:
            raw = _record(f"<video>{question}", answer) | {
                "videos": [{"frames": [f"{at}.png" for at in range(len(frames))], "times": list(_TIMES)}]
            }
            record = parse_record(raw, shard="", key=name)
            sample = renderers[layout].build(record, [], [[_png(frame) for frame in frames]], key=name)
            samples.append(Trial(name=f"{name} ({layout})", record=record, sample=sample, layout=layout))
    return samples


def _renderer(folder: Path, layout: VideoLayout) -> Renderer:
    return Renderer(
        folder,
        image=ImageConfig(min_tokens=4, max_tokens=96),
        video=VideoConfig(layout=layout, max_tokens=128),
        chat=ChatConfig(),
    )


def _record(question: str, answer: str) -> dict[str, Any]:
    return {"v": 1, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _canvas(colour: Sequence[int], height: int = 128, width: int = 192) -> Pixels:
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (height, width, 3)).copy()


def _square(pixels: Pixels, colour: Sequence[int], left: int, top: int, side: int = 40) -> Pixels:
    pixels[top : top + side, left : left + side] = colour
    return pixels


_STILLS: tuple[tuple[str, dict[str, Any], list[Pixels]], ...] = (
    (
        "text",
        _record("What is the capital of France?", "The capital of France is Paris."),
        [],
    ),
    (
        "image",
        _record("<image>What colour is the square?", "The square is red."),
        [_square(_canvas(_WHITE, 224, 288), _RED, 90, 60, 100)],
    ),
)
_VIDEOS: tuple[tuple[str, str, str, list[Pixels]], ...] = (
    (
        "moves right",
        "In which direction does the white square move?",
        "The white square moves from left to right.",
        [_square(_canvas(_BLACK), _WHITE, 4 + 20 * at, 44) for at in range(8)],
    ),
    (
        "moves down",
        "In which direction does the green square move?",
        "The green square moves from top to bottom.",
        [_square(_canvas(_WHITE), _GREEN, 76, 2 + 12 * at) for at in range(8)],
    ),
    (
        "turns blue",
        "At which second does the picture turn from red to blue?",
        "The picture turns from red to blue at 4.0 seconds.",
        [_canvas(_RED if at < 4 else _BLUE) for at in range(8)],
    ),
    (
        "appears",
        "At which second does the red square appear?",
        "The red square appears at 6.0 seconds.",
        [_square(_canvas(_WHITE), _RED if at >= 6 else _WHITE, 76, 44) for at in range(8)],
    ),
)

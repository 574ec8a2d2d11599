"""Training material: the kit's photographs, this package's text, generated videos, and a base without weights."""

import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.sizes import Assumed
from benchmarks.harness.machine import KIT
from data.config import ChatConfig, ImageConfig, VideoConfig
from data.format.record import parse_record
from data.render.sample import Renderer, Sample
from data.stream.batch import Batch, collate
from finetune.files.hubconfig import config_text, hub_config
from finetune.files.hubfiles import side_files
from finetune.files.tiny import TinyModel, tiny_family
from finetune.files.vocabulary import tiny_vocabulary

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
ANSWER_WORDS = 40
TINY = TinyModel(layers=4, vision_hidden=32, image_min_tokens=4)
"""Four layers, so that the last level of DeepStack reaches the loss; head size 16, as kernels need multiples of 8."""


def photographs() -> list[bytes]:
    """Return scikit-learn's two photographs, from the kit or from scikit-learn itself."""
    if KIT.is_dir():
        return [(KIT / "photographs" / name).read_bytes() for name in PHOTOGRAPHS]
    return [(files("sklearn.datasets.images") / name).read_bytes() for name in PHOTOGRAPHS]


def write_sides(folder: Path, model: TinyModel) -> Path:
    """Write a base's folder without weights: config, processors, tokenizer."""
    folder.mkdir(parents=True)
    vocabulary = tiny_vocabulary()
    family = tiny_family(model, vocabulary)
    sides = {**side_files(family, vocabulary.base_size, image_min_tokens=model.image_min_tokens), **vocabulary.files}
    for name, content in sides.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(config_text(hub_config(family)))
    return folder


def renderer(base: Path, *, max_tokens: int | None = None) -> Renderer:
    """Return a renderer for a base; `max_tokens` limits an image, None keeps the limits of the released models."""
    image = ImageConfig(min_tokens=4 if max_tokens else None, max_tokens=max_tokens)
    return Renderer(base, image=image, video=VideoConfig(max_tokens=64), chat=ChatConfig())


def conversation(question: str, answer: str, *, images: int = 0, frames: int = 0) -> dict[str, Any]:
    """Return a question and its answer about `images` photographs and a video of `frames` frames."""
    marks = "<image>" * images + "<video>" * bool(frames)
    raw: dict[str, Any] = {
        "messages": [{"role": "user", "content": marks + question}, {"role": "assistant", "content": answer}],
    }
    if images:
        raw["images"] = [f"{at}.jpg" for at in range(images)]
    if frames:
        raw["videos"] = [
            {"frames": [f"{at}.png" for at in range(frames)], "times": [float(at) for at in range(frames)]}
        ]
    return raw


def sample(
    made: Renderer, key: str, raw: dict[str, Any], *, images: Sequence[bytes] = (), film: Sequence[bytes] = ()
) -> Sample:
    """Render a conversation like a row of the data."""
    record = parse_record({"v": 1, **raw}, shard="", key=key)
    return made.build(record, images, [film] if film else [], key=key)


def packed(made: Renderer, samples: Sequence[Sample], *, multiple: int = 1) -> Batch:
    """Pack samples into one row."""
    return collate(
        samples, keys=[each.key for each in samples], pad_id=made.pad_id, multiple=multiple, widths=made.patch_widths
    )


def full_row(made: Renderer, tokens: int, seed: int) -> Batch:
    """Return a padded row of `tokens` with samples of many lengths; every second one is about a photograph."""
    generator = np.random.default_rng(seed)
    pictures, words = photographs(), text()
    samples: list[Sample] = []
    left = tokens
    while True:
        number, length = len(samples), int(generator.integers(10, 250))
        first = int(generator.integers(0, len(words) - length))
        images = [pictures[number // 2 % 2]] if number % 2 == 0 else []
        raw = conversation("What is this?", " ".join(words[first : first + length]), images=len(images))
        row_sample = sample(made, f"{seed}/{number}", raw, images=images)
        if len(row_sample.input_ids) > left:
            return packed(made, samples, multiple=tokens)
        samples.append(row_sample)
        left -= len(row_sample.input_ids)


def even_row(made: Renderer, tokens: int, seed: int, like: Assumed) -> Batch:
    """Return a padded row of `tokens` with as many samples of one length and kind as fit."""
    seen = photographs()
    each = np.prod(sample(made, "one", conversation("", "", images=1), images=seen[:1]).image_grids[0]) // 4
    images = [seen[at % 2] for at in range(round(like.vision_share * like.sample_tokens / each))]
    answer = _words(made, int(like.supervised_share * like.sample_tokens), seed)
    without = sample(made, "one", conversation("", answer, images=len(images)), images=images)
    question = _words(made, like.sample_tokens - len(without.input_ids) - 2, seed)
    full = sample(made, "one", conversation(question, answer, images=len(images)), images=images)
    samples = [replace(full, key=f"{seed}/{at}") for at in range(tokens // len(full.input_ids))]
    return packed(made, samples, multiple=tokens)


def _words(made: Renderer, tokens: int, seed: int) -> str:
    """Return as many words as fit into this many tokens."""
    words = text()
    many = [words[(seed + at) % len(words)] for at in range(tokens)]
    count = bisect_right(range(tokens), tokens, key=lambda count: len(made.encode(" ".join(many[:count])))) - 1
    return " ".join(many[: max(count, 0)])


def text() -> list[str]:
    """Return the words of the text on which the tiny vocabulary was trained."""
    return files("finetune").joinpath("assets", "tokenizer_text.txt").read_text(encoding="utf-8").split()


def film(frames: int = 6) -> list[bytes]:
    """Return frames of a moving white square; images, because the kit has no video decoder."""
    made = []
    for at in range(frames):
        pixels = np.zeros((64, 96, 3), dtype=np.uint8)
        pixels[20:44, 4 + 10 * at : 28 + 10 * at] = 255
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        made.append(buffer.getvalue())
    return made


def write_rows(folder: Path, number: int) -> None:
    """Write rows.jsonl like a user's; three of four rows have a photograph."""
    for name, data in zip(PHOTOGRAPHS, photographs(), strict=True):
        (folder / name).write_bytes(data)
    words = text()
    rows = []
    for at in range(number):
        row = conversation(f"Number {at}?", " ".join(words[7 * at % 500 :][:ANSWER_WORDS]), images=at % 4 != 3)
        rows.append(row | ({"images": [PHOTOGRAPHS[at % 2]]} if at % 4 != 3 else {}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

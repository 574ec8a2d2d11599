"""Synthetic corpora with a typical mix, for benchmarks of the data path: lengths alone, or rows with pictures."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.stream.pack import Ints
from data.stream.plan import Units

MIX = "25 % text, 45 % one image, 20 % two to six images, 10 % video; log-normal lengths, mean about 1.5 k tokens"


def mixed_lengths(count: int, budget: int, seed: int = 0) -> tuple[Ints, Ints]:
    """Return tokens and patches of samples, none of them longer than the budget."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, count, p=[0.25, 0.45, 0.2, 0.1])
    text = np.clip(rng.lognormal(5.6, 0.8, count), 20, 6000).astype(np.int64)
    images = np.where(kind == 1, 1, np.where(kind == 2, rng.integers(2, 7, count), 0))
    vision = (images * np.clip(rng.lognormal(6.2, 0.6, count), 64, 4096)).astype(np.int64)
    clips = np.clip(rng.lognormal(8.2, 0.6, count), 500, 12000).astype(np.int64)
    vision = np.where(kind == 3, clips, vision)
    return np.minimum(text + vision, budget), 4 * np.minimum(vision, budget)


def mixed_units(name: str, count: int, budget: int, *, per_shard: int = 1000) -> Units:
    """Return a source of such samples in shards."""
    tokens, patches = mixed_lengths(count, budget)
    number = np.arange(count)
    return Units(
        name=name,
        shard=number // per_shard,
        sample=number % per_shard,
        part=np.zeros_like(number),
        tokens=tokens,
        patches=patches,
    )


def write_rows(folder: Path, count: int, *, pictures: int = 20) -> Path:
    """Write a JSONL file of questions, every second one about a photo; with `pictures` 0, all rows are text."""
    rng = np.random.default_rng(0)
    for number in range(pictures):
        smooth = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
        out = io.BytesIO()
        smooth.save(out, "JPEG", quality=85)
        (folder / f"{number}.jpg").write_bytes(out.getvalue())
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(count):
            mark = "<image>" if number % 2 and pictures else ""
            answer = " ".join(f"word{n}" for n in range(10 + number * 37 % 90))
            images = [f"{number % pictures}.jpg"] if mark else []
            turns = [{"role": "user", "content": f"{mark}{number}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns, "images": images}) + "\n")
    return path

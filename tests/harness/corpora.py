"""A small corpus of every kind of sample in real shards, for tests of plan, stream and commands."""

import hashlib
import json
from functools import cache

import torch
from bases import base
from media_files import clip, encode, moving, picture
from PIL import Image

from data.config import ChatConfig, ImageConfig, VideoConfig
from data.format.tar import TarWriter
from data.render.sample import Renderer
from data.stream.corpus import Limits, load_corpus

LIMITS = Limits(tokens=384, patches=4 * 384)


@cache
def renderer():
    return Renderer(
        base("tiny", None),
        image=ImageConfig(min_tokens=4, max_tokens=16),
        video=VideoConfig(max_tokens=64),
        chat=ChatConfig(),
    )


@cache
def media():
    return {
        "0.png": encode(Image.fromarray(picture(64, 96, 0))),
        "1.jpg": encode(Image.fromarray(picture(130, 70, 1)), "JPEG"),
        "2.mp4": clip(moving(20, 64, 64), rate=10),
    }


def sample_json(number, **more):
    """Return a sample's JSON; samples cycle through text of many lengths, one image, two images and a video."""
    words = " ".join(f"w{number * 7 + n}" for n in range(3 + number * 37 % 50))
    marks = ("", "<image>", "<image> <image>", "", "<video>", "")[number % 6]
    raw = {
        "v": 1,
        "messages": [{"role": "user", "content": f"{marks}{number}?"}, {"role": "assistant", "content": words}],
        "images": ["0.png", "1.jpg"][: marks.count("<image>")],
        "videos": ["2.mp4"] if "<video>" in marks else [],
    }
    return raw | more


def write_sample(tar, key, raw):
    tar.add(f"{key}.json", json.dumps(raw).encode())
    for name in [*raw.get("images", ()), *raw.get("videos", ())]:
        tar.add(f"{key}.{name}", media()[name])


def write_shards(folder, count=90, per_shard=30, make=sample_json):
    """Write `count` samples to shards; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, count, per_shard):
        paths.append(folder / f"part-{first // per_shard:03d}.tar")
        with TarWriter(paths[-1]) as tar:
            for number in range(first, min(count, first + per_shard)):
                write_sample(tar, f"{number:05d}", make(number))
    return paths


def corpus_of(sources, limits=LIMITS, **options):
    return load_corpus(sources, renderer(), limits, **options)


def digest(batch):
    """Return a digest of a pack, down to the last bit."""
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return hashlib.md5(b"".join(tensor.numpy().tobytes() for tensor in tensors) + repr(batch.keys).encode()).hexdigest()

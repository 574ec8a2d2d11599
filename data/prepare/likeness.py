"""Hashes of word sequences and of pictures, by which a sample is found again in other data."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.format.facts import VideoFacts
from data.format.record import Record
from data.render.frames import decode_images, open_video
from data.render.image import decode_image
from data.shards.bytes import Places, VideoBytes
from data.shards.reader import SampleReader

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Thumbs = np.ndarray[Any, np.dtype[np.float32]]

WORDS = 13
"""Words of a sequence, as in the reports on GPT-3 and the models after it."""
FEWEST_WORDS = 5
"""A message with fewer words says too little; one with fewer than `WORDS` counts as a single sequence."""
FRAMES = 16
"""Frames of a video that are compared, spread evenly over it."""

# a sign of Chinese, Japanese or Korean counts as a word, because these languages put no blanks between words
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_SIDE = 32  # pixels of the picture that is hashed
_LOW = 8  # lowest frequencies in each direction that are kept
_THUMB = 16
_FLAT = 1.0  # standard deviation of grey values below which a picture shows nothing
_GREY = torch.tensor([0.299, 0.587, 0.114])


def _windows() -> list[tuple[float, float, float]]:
    """Return the parts of an image that a crop may have kept, as top, left and size; the entire image is the first."""
    whole = [(0.0, 0.0, 1.0)]
    near = [((1 - 0.9) * y / 2, (1 - 0.9) * x / 2, 0.9) for y in range(3) for x in range(3)]
    far = [((1 - 0.8) * y / 4, (1 - 0.8) * x / 4, 0.8) for y in range(5) for x in range(5)]
    return whole + near + far


WINDOWS = _windows()


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of one sample: a hash and a small grey copy of each window, `[pictures, windows]`."""

    hashes: Hashes
    thumbs: Thumbs  # [pictures, windows, 256], each with mean 0 and length 1
    videos: tuple[int, ...]  # for each picture the number of its video; -1 for an image


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The hashes of one sample."""

    number: int  # in its shard
    sequences: Hashes  # each once, in order of value
    pictures: Pictures


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def sequences_of(record: Record) -> Hashes:
    """Return the hashes of all word sequences in a record's messages; the system's message is left out."""
    hashes = set()
    for message in record.messages:
        if message.role == "system":
            continue
        words = words_of(" ".join(content.text for content in message.contents if content.kind == "text"))
        if len(words) < FEWEST_WORDS:
            continue
        for first in range(max(1, len(words) - WORDS + 1)):
            text = " ".join(words[first : first + WORDS])
            hashes.add(int.from_bytes(blake2b(text.encode(), digest_size=8).digest()))
    return np.array(sorted(hashes), dtype=np.uint64)


def _cosines() -> torch.Tensor:
    """Return the first rows of the cosine transform of `_SIDE` values."""
    at = torch.arange(_SIDE, dtype=torch.float32) + 0.5
    return torch.cos(torch.outer(torch.arange(_LOW, dtype=torch.float32), at) * (torch.pi / _SIDE))


_DCT = _cosines()


def prints_of(pixels: torch.Tensor, *, windows: int = len(WINDOWS)) -> tuple[Hashes, Thumbs] | None:
    """Return the hash and the small grey copy of the first `windows` windows; None for a picture that shows nothing.

    A hash has one bit for each low frequency of the picture: whether it is above the median of all of them.
    """
    rows, columns = pixels.shape[0] - 1, pixels.shape[1] - 1
    grey = (pixels.float() @ _GREY)[None, None]
    small = torch.nn.functional.interpolate(grey, size=(160, 160), mode="bilinear", antialias=True)
    if min(rows, columns) < 1 or float(small.std()) < _FLAT:
        return None
    cuts = []
    for top, left, size in WINDOWS[:windows]:
        side = round(160 * size)
        y, x = round(160 * top), round(160 * left)
        cuts.append(torch.nn.functional.adaptive_avg_pool2d(small[:, :, y : y + side, x : x + side], _SIDE)[0, 0])
    views = torch.stack(cuts)
    low = (_DCT @ views @ _DCT.T).flatten(1)[:, 1:]  # without the mean, so that brightness does not count
    bits = (low > low.median(dim=1, keepdim=True).values).numpy()
    weights = np.left_shift(np.uint64(1), np.arange(bits.shape[1], dtype=np.uint64))
    hashes: Hashes = (bits * weights).sum(axis=1, dtype=np.uint64)
    thumbs = torch.nn.functional.adaptive_avg_pool2d(views[:, None], _THUMB).flatten(1)
    thumbs = torch.nn.functional.normalize(thumbs - thumbs.mean(dim=1, keepdim=True), dim=1)
    return hashes, thumbs.numpy()


def pictures_of(
    images: Sequence[bytes], videos: Sequence[VideoBytes], facts: Sequence[VideoFacts], *, windows: bool
) -> Pictures:
    """Return the prints of a sample's images and of frames of its videos; frames are compared as a whole."""
    prints, owners = [], []
    for number, data in enumerate(images):
        seen = prints_of(decode_image(data, name=f"images[{number}]"), windows=len(WINDOWS) if windows else 1)
        if seen is not None:
            prints.append(seen)
            owners.append(-1)
    for number, clip in enumerate(videos):
        for frame in _frames(clip, facts[number], f"videos[{number}]"):
            if (seen := prints_of(frame, windows=1)) is not None:
                prints.append(seen)
                owners.append(number)
    width = max((len(hashes) for hashes, _ in prints), default=1)
    return Pictures(
        # the missing windows of a frame repeat the entire frame
        hashes=np.array([np.resize(hashes, width) for hashes, _ in prints], dtype=np.uint64).reshape(-1, width),
        thumbs=np.array([np.resize(thumbs, (width, _THUMB**2)) for _, thumbs in prints], dtype=np.float32).reshape(
            -1, width, _THUMB**2
        ),
        videos=tuple(owners),
    )


def _frames(clip: VideoBytes, facts: VideoFacts, name: str) -> Iterator[torch.Tensor]:
    count = min(FRAMES, facts.frames)
    numbers = [(2 * number + 1) * facts.frames // (2 * count) for number in range(count)]
    if isinstance(clip, list):
        yield from decode_images(clip, numbers, name=name)
        return
    with open_video(clip, name=name, timeout=600.0) as film:
        yield from film.frames(numbers)


def shard_traits(
    shard: Path, *, windows: bool, cache_dir: Path | None, places: Places
) -> tuple[list[Traits], dict[int, str]]:
    """Return the traits of a shard's samples, and the reasons of those that cannot be read."""
    reader = SampleReader(cache_dir=cache_dir, places=places)
    index = reader.index(shard)
    traits, problems = [], dict(index.problems)
    for number in range(len(index)):
        if number in index.problems:
            continue
        try:
            record, members = reader.sample(shard, number)
            images, videos = reader.media(record, members, shard.parent)
            pictures = pictures_of(images, videos, index.videos(number), windows=windows)
        except ValueError as error:
            problems[number] = str(error)
            continue
        traits.append(Traits(number=number, sequences=sequences_of(record), pictures=pictures))
    reader.bytes.close()
    return traits, problems

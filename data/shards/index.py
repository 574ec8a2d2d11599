"""The sidecar index of a shard: byte ranges, checksums, sizes of media, and what is wrong with which sample. No torch.

Media are probed (headers only) while the index is built; that part imports the decoders, loading an index does not.
"""

import json
import os
import zipfile
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data.format.facts import ImageFacts, VideoFacts
from data.format.tar import ShardError

VERSION = 1
_EDGE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What one shard holds. Rows of members follow samples; rows of images, videos and times follow their owners."""

    stamp: str  # size and both ends of the tar: tells a stale index from a good one
    digest: str  # names, checksums, sizes of media: the same content has the same digest anywhere
    keys: tuple[str, ...]
    names: tuple[str, ...]
    problems: dict[int, str] = field(default_factory=dict)  # sample number -> why it cannot be used
    member_starts: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    crcs: np.ndarray[Any, Any]
    image_starts: np.ndarray[Any, Any]
    image_sizes: np.ndarray[Any, Any]  # [images, 2] height, width
    video_starts: np.ndarray[Any, Any]
    video_table: np.ndarray[Any, Any]  # [videos, 5] height, width, frames, duration, rate
    time_starts: np.ndarray[Any, Any]
    times: np.ndarray[Any, Any]

    def __len__(self) -> int:
        """Number of samples, unusable ones included."""
        return len(self.keys)

    def member_rows(self, number: int) -> tuple[int, int]:
        """First member row of a sample, and the row after its last."""
        return int(self.member_starts[number]), int(self.member_starts[number + 1])

    def images(self, number: int) -> list[ImageFacts]:
        """Facts of the images of one sample, in the record's order."""
        rows = self.image_sizes[self.image_starts[number] : self.image_starts[number + 1]]
        return [ImageFacts(height=int(height), width=int(width)) for height, width in rows]

    def videos(self, number: int) -> list[VideoFacts]:
        """Facts of the videos of one sample, in the record's order."""
        return [self._video(row) for row in range(self.video_starts[number], self.video_starts[number + 1])]

    def _video(self, row: int) -> VideoFacts:
        height, width, frames, duration, rate = self.video_table[row].tolist()
        times = tuple(self.times[self.time_starts[row] : self.time_starts[row + 1]].tolist())
        return VideoFacts(
            height=int(height), width=int(width), frames=int(frames), duration=duration, rate=rate, times=times or None
        )


_ARRAYS = tuple(item.name for item in fields(ShardIndex) if "ndarray" in str(item.type))


def stamp_of(shard: Path) -> str:
    """Changes when the tar does: its size and both of its ends."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        return f"{size}-{blake2b(head + file.read(_EDGE), digest_size=8).hexdigest()}"


def sidecar(shard: Path, suffix: str, cache_dir: Path | None) -> Path:
    """Beside the shard; in the cache folder, if one is given, under a name made from the whole path."""
    if cache_dir is None:
        return shard.with_name(shard.name + suffix)
    place = blake2b(str(shard.absolute()).encode(), digest_size=8).hexdigest()
    return cache_dir / f"{shard.name}-{place}{suffix}"


def write_beside(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Writes arrays (no pickles) beside `path` and renames, so that readers see the whole file or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        hint = "set data.cache_dir (or --cache-dir) to a folder that can be written"
        raise ShardError(path, f"cannot write the index: {error.strerror}; {hint}") from error
    beside.replace(path)


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """Arrays of a sidecar, or None where there is none or it is damaged (it is made again then)."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def save_index(index: ShardIndex, path: Path) -> None:
    """One file without pickles."""
    problems = [[number, reason] for number, reason in index.problems.items()]
    head = {"version": VERSION, "stamp": index.stamp, "digest": index.digest, "problems": problems}
    text = {"head": head, "keys": index.keys, "names": index.names}
    arrays = {name: np.frombuffer(json.dumps(value).encode(), dtype=np.uint8) for name, value in text.items()}
    write_beside(path, arrays | {name: getattr(index, name) for name in _ARRAYS})


def read_index(path: Path, stamp: str) -> ShardIndex | None:
    """The stored index, or None where it is absent, damaged, of another version or of another tar."""
    arrays = read_arrays(path)
    if arrays is None or not {"head", "keys", "names", *_ARRAYS} <= set(arrays):
        return None
    head = json.loads(arrays["head"].tobytes())
    if head["version"] != VERSION or head["stamp"] != stamp:
        return None
    return ShardIndex(
        stamp=stamp,
        digest=head["digest"],
        keys=tuple(json.loads(arrays["keys"].tobytes())),
        names=tuple(json.loads(arrays["names"].tobytes())),
        problems={number: reason for number, reason in head["problems"]},
        **{name: arrays[name] for name in _ARRAYS},
    )

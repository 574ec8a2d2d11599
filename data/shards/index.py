"""The index beside a shard: byte ranges, checksums, sizes of media, and samples that cannot be used. No torch.

Media are probed (headers only) while the index is built; that part imports the decoders, loading an index does not.
"""

import json
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data.format.facts import ImageFacts, VideoFacts
from data.shards.sidecar import read_arrays, write_arrays
from data.stores.remote import remote_of

VERSION = 3
SHOWN = ("", "auto")
"""Layouts that the members of a shard show by themselves."""
_EDGE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The content of one shard. Members are in order of samples; images, videos and times in order of their owners."""

    stamp: str  # made from size and both ends of the tar, to recognise a stale index
    places: str = ""  # of media outside the shard; empty: it has none, so the index is valid anywhere
    layout: str = ""  # how members become a record (layout.py); empty: our record is one of them
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
        """The number of samples, unusable ones included."""
        return len(self.keys)

    def member_rows(self, number: int) -> tuple[int, int]:
        """Return the first member row of a sample, and the row after its last."""
        return int(self.member_starts[number]), int(self.member_starts[number + 1])

    def images(self, number: int) -> list[ImageFacts]:
        """Return the facts of a sample's images, in the record's order."""
        rows = self.image_sizes[self.image_starts[number] : self.image_starts[number + 1]]
        return [ImageFacts(height=int(height), width=int(width)) for height, width in rows]

    def videos(self, number: int) -> list[VideoFacts]:
        """Return the facts of a sample's videos, in the record's order."""
        return [self._video(row) for row in range(self.video_starts[number], self.video_starts[number + 1])]

    def _video(self, row: int) -> VideoFacts:
        height, width, frames, duration, rate = self.video_table[row].tolist()
        times = tuple(self.times[self.time_starts[row] : self.time_starts[row + 1]].tolist())
        return VideoFacts(
            height=int(height), width=int(width), frames=int(frames), duration=duration, rate=rate, times=times or None
        )


_ARRAYS = tuple(item.name for item in fields(ShardIndex) if "ndarray" in str(item.type))


def stamp_of(shard: Path) -> str:
    """Return a text that changes when the tar does: its size and a checksum of both ends, or a store's id of it."""
    if (remote := remote_of(shard)) is not None:
        return f"{remote.size}-{remote.id}"
    size = shard.stat().st_size
    with shard.open("rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        return f"{size}-{blake2b(head + file.read(_EDGE), digest_size=8).hexdigest()}"


def save_index(index: ShardIndex, path: Path) -> None:
    """Write the index to one file, without pickles."""
    problems = [[number, reason] for number, reason in index.problems.items()]
    head = {"version": VERSION, "stamp": index.stamp, "places": index.places, "digest": index.digest}
    head |= {"layout": index.layout, "problems": problems}
    text = {"head": head, "keys": index.keys, "names": index.names}
    arrays = {name: np.frombuffer(json.dumps(value).encode(), dtype=np.uint8) for name, value in text.items()}
    write_arrays(path, arrays | {name: getattr(index, name) for name in _ARRAYS})


def read_index(path: Path, stamp: str, places: str, declared: str = "") -> ShardIndex | None:
    """Read a stored index; None if it is absent, damaged, or of another version, tar, places of media or layout.

    `declared` is the layout that a source or a note declares; without one, that of the index stands.
    """
    arrays = read_arrays(path)
    if arrays is None or {"head", "keys", "names", *_ARRAYS} != set(arrays):
        return None
    head = json.loads(arrays["head"].tobytes())
    if head["version"] != VERSION or head["stamp"] != stamp or head["places"] not in ("", places):
        return None
    if head["layout"] != declared and (declared or head["layout"] not in SHOWN):
        return None
    return ShardIndex(
        stamp=stamp,
        places=head["places"],
        layout=head["layout"],
        digest=head["digest"],
        keys=tuple(json.loads(arrays["keys"].tobytes())),
        names=tuple(json.loads(arrays["names"].tobytes())),
        problems={number: reason for number, reason in head["problems"]},
        **{name: arrays[name] for name in _ARRAYS},
    )

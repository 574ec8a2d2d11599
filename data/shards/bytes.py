"""Reads bytes by place, from files that stay open; fetch.py reads urls. No torch."""

import os
import stat
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from data.config import DataConfig
from data.format.media import Place, VideoRef
from data.format.record import Record
from data.rows.columns import Columns
from data.shards.fetch import fetch_url
from data.shards.names import names_shard, origin_of_shard
from data.stores.cache import CacheCounts, open_shard, read_sparsely
from data.stores.remote import remote_of

_OPEN_FILES = 64
MAX_MEDIUM = 1 << 32
"""Most bytes read from one medium outside the shards."""

VideoBytes = bytes | list[bytes]


@dataclass(frozen=True, kw_only=True)
class Places:
    """The media outside the shards that a reader may read."""

    root: Path | None = None  # folder where relative paths start and which no path may leave; None: that of the shards
    allow_private: bool = False  # urls may name addresses that are not public
    maps: tuple[tuple[str, str], ...] = ()  # of sources of foreign shards: the path, and `map` as JSON

    @property
    def name(self) -> str:
        """A name for these places, kept in an index, because other places may have other media."""
        return f"{'' if self.root is None else self.root.absolute()} {self.allow_private}"

    @property
    def suffix(self) -> str:
        """The suffix of file names that depend on these places; empty for the default."""
        is_default = self.root is None and not self.allow_private
        return "" if is_default else f"-{blake2b(self.name.encode(), digest_size=4).hexdigest()}"

    def map_of(self, shard: Path) -> str:
        """Return the `map` of the source that a shard belongs to, as JSON; empty where there is none."""
        mapped = {text for path, text in self.maps if names_shard(path, origin_of_shard(shard))}
        if len(mapped) > 1:
            raise ValueError(f"{shard} belongs to two sources with different maps; give one of them a copy")
        return "".join(mapped)

    def beside(self, shard: Path, suffix: str) -> str:
        """Return the suffix of a file beside a shard, which is another one for each `map`."""
        mapped = self.map_of(shard)
        return f".{blake2b(mapped.encode(), digest_size=4).hexdigest()}{suffix}" if mapped else suffix

    def find(self, path: str, folder: Path) -> Path:
        """Return the file of a medium; raise ValueError if the path, with its links followed, leaves the root."""
        if self.root is None and not path.startswith("/") and (remote := remote_of(folder / "shard")) is not None:
            raise ValueError(
                f"{path} is a file beside {remote.shown}, and only shards are fetched from there. Put it into the "
                f"shard, or set data.media_root to a folder that contains it"
            )
        if self.root is None:
            return folder / path
        place = Path(os.path.realpath(self.root / path))
        if not place.is_relative_to(os.path.realpath(self.root)):
            raise ValueError(
                f"{path} leads out of data.media_root={self.root}; move the file there, or set a parent folder"
            )
        return place


def places_of(config: DataConfig) -> Places:
    """Return the places of media outside the shards."""
    root = Path(config.media_root) if config.media_root else None
    sources = {source.path: Columns.of(source.map).text for source in config.sources.values() if source.map}
    return Places(root=root, allow_private=config.allow_private_addresses, maps=tuple(sources.items()))


class ByteReader:
    """Reads at positions, with few files held open. Each process needs its own, because a fork shares file handles."""

    def __init__(self, places: Places | None = None) -> None:
        self.places = places or Places()
        self.outside = False  # whether a medium outside the shards was read
        self.counts = CacheCounts()
        self.sparse: Collection[Path] = ()  # shards of stores that are read by ranges, unless they are in the cache
        self._files: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return exactly these bytes, or raise ValueError; StoreError if a store does not give them."""
        if remote_of(path) is not None:
            return self._read_cached(path, offset, size)
        try:
            return _read(self._open(path), path, offset, size)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error

    def _read_cached(self, path: Path, offset: int, size: int) -> bytes:
        """Read from the cache. The file is closed at once: an open one could not make room for others."""
        if path in self.sparse and (data := read_sparsely(path, offset, size, self.counts)) is not None:
            return data
        number = open_shard(path, self.counts)
        try:
            return _read(number, path, offset, size)
        finally:
            os.close(number)

    def read_place(self, place: Place, folder: Path) -> bytes:
        """Return the bytes of a medium given by path (relative to `folder`, or to the root of media) or url."""
        self.outside = True
        if place.url is not None:
            return fetch_url(place.url, place.range, allow_private=self.places.allow_private)
        assert place.path is not None, "members are read with their sample"
        path = self.places.find(place.path, folder)
        try:
            size = os.fstat(self._open(path)).st_size
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        offset, length = place.range or (0, size)
        if offset + length > size:
            raise ValueError(f"{path} ends too early: {length} bytes were requested from byte {offset}, it has {size}")
        if length > MAX_MEDIUM:
            raise ValueError(f"{path}: {length:,} bytes; at most {MAX_MEDIUM:,} of a file are read. Cut it")
        return self.read(path, offset, length)

    def _open(self, path: Path) -> int:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
            if not stat.S_ISREG(os.fstat(number).st_mode):
                os.close(number)
                raise ValueError(f"cannot read {path}: it is no regular file")
            self._files[path] = number
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[path]

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])


def _read(number: int, path: Path, offset: int, size: int) -> bytes:
    data = os.pread(number, size, offset)
    while 0 < len(data) < size and (more := os.pread(number, size - len(data), offset + len(data))):
        data += more
    if len(data) != size:
        raise ValueError(f"{path} ends too early: {size} bytes were requested from byte {offset}, got {len(data)}")
    return data


def read_media(
    record: Record, members: dict[str, bytes], folder: Path, files: ByteReader
) -> tuple[list[bytes], list[VideoBytes]]:
    """Return the bytes of images and videos in order, of a frame list as a list; ValueError if one cannot be read."""

    def load(place: Place) -> bytes:
        return members[place.member] if place.member is not None else files.read_place(place, folder)

    def load_video(video: VideoRef) -> VideoBytes:
        return [load(frame) for frame in video.frames] if video.frames else load(video)

    return [load(image) for image in record.images], [load_video(video) for video in record.videos]

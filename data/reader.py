"""Bytes of records and media: from shards, from files that samples share, from the web. Errors say where. No torch."""

import os
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from zlib import crc32

from data.index import ShardIndex, load_index
from data.media import Place, VideoRef
from data.record import Record, RecordError, parse_record

_OPEN_FILES = 64
_OPEN_INDEXES = 256
_FETCH_SECONDS = 30
_LARGEST_FETCH = 1 << 32


def fetch_url(url: str, span: tuple[int, int] | None, attempts: int = 3) -> bytes:
    """The body, or the range of it; ValueError after `attempts` tries."""
    headers = {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"} if span else {}
    request = urllib.request.Request(url, headers=headers)  # scheme checked by the record: http or https
    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(0.5 * attempt)
        try:
            with urllib.request.urlopen(request, timeout=_FETCH_SECONDS) as reply:
                body: bytes = reply.read(_LARGEST_FETCH)
                if not span:
                    return body
                if reply.status == 200:  # the server ignored the range and sent everything
                    body = body[span[0] : span[0] + span[1]]
                if len(body) == span[1]:
                    return body
                problem = f"got {len(body)} bytes instead of {span[1]}"
        except (OSError, urllib.error.HTTPError) as error:
            problem = str(error)
    raise ValueError(f"cannot fetch {url} after {attempts} attempts: {problem}")


class ByteReader:
    """Positioned reads with few files held open. One per process: file handles do not survive a fork well."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Exactly these bytes, or ValueError."""
        try:
            data = os.pread(self._open(path), size, offset)
            while 0 < len(data) < size and (more := os.pread(self._open(path), size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != size:
            raise ValueError(f"{path} ends too early: {size} bytes from byte {offset} were asked for, got {len(data)}")
        return data

    def read_place(self, place: Place, folder: Path) -> bytes:
        """Bytes of a medium given by path (relative to `folder`) or url."""
        if place.url is not None:
            return fetch_url(place.url, place.range)
        assert place.path is not None, "members are read with their sample"
        path = folder / place.path
        if place.range is None:
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from error
            return self.read(path, 0, size)
        return self.read(path, *place.range)

    def _open(self, path: Path) -> int:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[path]

    def close(self) -> None:
        """Closes every file."""
        while self._files:
            os.close(self._files.popitem()[1])


class SampleReader:
    """Samples of any shard by number, checked against the index's checksums."""

    def __init__(self, *, cache_dir: Path | None = None) -> None:
        self.bytes = ByteReader()
        self._cache_dir = cache_dir
        self._indexes: OrderedDict[Path, ShardIndex] = OrderedDict()

    def index(self, shard: Path) -> ShardIndex:
        """The shard's index, from memory if it was used lately."""
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
        else:
            self._indexes[shard] = load_index(shard, cache_dir=self._cache_dir)
            if len(self._indexes) > _OPEN_INDEXES:
                self._indexes.popitem(last=False)
        return self._indexes[shard]

    def members(self, shard: Path, number: int) -> dict[str, bytes]:
        """Bytes of every member of one sample by one read; RecordError when they changed since indexing."""
        index = self.index(shard)
        rows = range(*index.member_rows(number))
        first, last = rows[0], rows[-1]
        start = int(index.offsets[first])
        try:
            blob = self.bytes.read(shard, start, int(index.offsets[last] + index.sizes[last]) - start)
        except ValueError as error:
            raise RecordError(shard=shard.name, key=index.keys[number], reason=str(error)) from error
        found = {}
        for row in rows:
            at = int(index.offsets[row]) - start
            found[index.names[row]] = data = blob[at : at + int(index.sizes[row])]
            if crc32(data) != index.crcs[row]:
                reason = f"{index.names[row]} changed since it was indexed; run: moetune shards index --force {shard}"
                raise RecordError(shard=shard.name, key=index.keys[number], reason=reason)
        return found

    def sample(self, shard: Path, number: int) -> tuple[Record, dict[str, bytes]]:
        """The parsed record and the bytes of its media."""
        members = self.members(shard, number)
        return self._parse(shard, number, members.pop("json", None), members), members

    def record(self, shard: Path, number: int) -> Record:
        """The parsed record alone; media are not read."""
        index = self.index(shard)
        names = {index.names[row]: row for row in range(*index.member_rows(number))}
        row = names.pop("json", None)
        raw = None if row is None else self.bytes.read(shard, int(index.offsets[row]), int(index.sizes[row]))
        return self._parse(shard, number, raw, names)

    def _parse(self, shard: Path, number: int, raw: bytes | None, members: Collection[str]) -> Record:
        key = self.index(shard).keys[number]
        if raw is None:
            raise RecordError(shard=shard.name, key=key, reason=f"has no json member, only {sorted(members)}")
        return parse_record(raw, shard=shard.name, key=key, members=members)

    def media(self, record: Record, members: dict[str, bytes], folder: Path) -> tuple[list[bytes], list["VideoBytes"]]:
        """Bytes of images and videos in order; a frame list gives a list. ValueError when something cannot be read."""

        def load(place: Place) -> bytes:
            return members[place.member] if place.member is not None else self.bytes.read_place(place, folder)

        def load_video(video: VideoRef) -> VideoBytes:
            return [load(frame) for frame in video.frames] if video.frames else load(video)

        return [load(image) for image in record.images], [load_video(video) for video in record.videos]


VideoBytes = bytes | list[bytes]

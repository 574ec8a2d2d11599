"""Bytes by place: from files that stay open, and from the web. No torch."""

import os
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from pathlib import Path

from data.format.media import Place, VideoRef
from data.format.record import Record

_OPEN_FILES = 64
_FETCH_SECONDS = 30
_LARGEST_FETCH = 1 << 32

VideoBytes = bytes | list[bytes]


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


def read_media(
    record: Record, members: dict[str, bytes], folder: Path, files: ByteReader
) -> tuple[list[bytes], list[VideoBytes]]:
    """Bytes of images and videos in order; a frame list gives a list. ValueError when something cannot be read."""

    def load(place: Place) -> bytes:
        return members[place.member] if place.member is not None else files.read_place(place, folder)

    def load_video(video: VideoRef) -> VideoBytes:
        return [load(frame) for frame in video.frames] if video.frames else load(video)

    return [load(image) for image in record.images], [load_video(video) for video in record.videos]

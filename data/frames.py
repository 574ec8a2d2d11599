"""Decoding: the frames of a video by number, exactly, and what a video file is.

A packet index is read first (no decoding), so that only the frames behind the last keyframe before each wanted one are
decoded. Times are those in the file, since the first frame.
"""

import bisect
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream

from data.facts import VideoFacts
from data.vision import VisionSpec, decode_image, resize

# no playlists, no image sequences, nothing that opens another file or address
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
_REGULAR_SECONDS = 0.010  # a frame rate is constant when no frame is further off its beat


class VideoRefused(ValueError):
    """A video that cannot be used as it is; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class _Index:
    pts: list[int]  # of every frame, in order of showing
    keys: list[int]  # frame numbers that can be decoded on their own


class _Deadline:
    """Refuses to go on after so many seconds."""

    def __init__(self, seconds: float, name: str) -> None:
        self._end, self._seconds, self._name = time.monotonic() + seconds, seconds, name

    def check(self) -> None:
        """To be called often."""
        if time.monotonic() > self._end:
            raise VideoRefused(
                f"{self._name}: decoding took longer than data.video.timeout_seconds={self._seconds:g}; cut the video "
                f"shorter, re-encode it with more keyframes, or raise the limit"
            )


def probe_video(data: bytes, *, name: str = "video", timeout: float = 60.0) -> VideoFacts:
    """Size as seen, number of frames and their times; nothing but the first frame is decoded where the file allows."""
    deadline = _Deadline(timeout, name)
    with _opened(data, name) as (container, stream):
        index = _read_index(container, stream, deadline)
        container.seek(0, backward=True)
        first = next(iter(container.decode(stream)), None)
        if first is None or not index.pts:
            raise VideoRefused(f"{name}: no frame can be decoded")
        height, width = _upright(first).shape[:2]
        assert stream.time_base is not None, "a stream that was decoded has a time base"
        tick = float(stream.time_base)
        times = [(pts - index.pts[0]) * tick for pts in index.pts]
        return _facts(height, width, times, tick, stream)


def _facts(height: int, width: int, times: list[float], tick: float, stream: VideoStream) -> VideoFacts:
    n = len(times)
    declared = float(stream.average_rate) if stream.average_rate else 0.0
    beat = times[-1] / (n - 1) if n > 1 else 0.0
    if n == 1 or beat <= 0:
        rate = declared or 1.0
        return VideoFacts(height=height, width=width, frames=n, duration=n / rate, rate=rate)
    # the declared rate is exact where the times are rounded to milliseconds, but some files declare nonsense
    agrees = declared > 0 and abs(times[-1] - (n - 1) / declared) <= max(0.001, tick)
    rate = declared if agrees else 1 / beat
    if all(abs(seconds - number / rate) <= max(_REGULAR_SECONDS, tick) for number, seconds in enumerate(times)):
        return VideoFacts(height=height, width=width, frames=n, duration=n / rate, rate=rate)
    duration = times[-1] * n / (n - 1)
    return VideoFacts(height=height, width=width, frames=n, duration=duration, rate=n / duration, times=tuple(times))


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(io.BytesIO(data), mode="r", options={"format_whitelist": _FORMATS}) as container:
            if not container.streams.video:
                raise VideoRefused(f"{name}: the file has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # workers are processes; threads of one decoder only steal from them
            yield container, stream
    except VideoRefused:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError, LookupError, ArithmeticError) as error:
        raise VideoRefused(f"{name}: not a readable video ({type(error).__name__}: {error})") from error


def _read_index(container: InputContainer, stream: VideoStream, deadline: _Deadline) -> _Index:
    is_key: dict[int, bool] = {}
    for packet in container.demux(stream):
        deadline.check()
        if packet.size == 0 or packet.is_discard:  # the flush at the end; frames cut off by an edit list
            continue
        if packet.pts is None:
            return _index_by_decoding(container, stream, deadline)
        is_key[packet.pts] = packet.is_keyframe
    pts = sorted(is_key)
    return _Index(pts=pts, keys=[number for number, time in enumerate(pts) if is_key[time]])


def _index_by_decoding(container: InputContainer, stream: VideoStream, deadline: _Deadline) -> _Index:
    """For files whose packets carry no times: whole frames are asked, and numbered where they have none either."""
    container.seek(0, backward=True)
    pts: list[int] = []
    assert stream.time_base is not None, "a stream that was opened has a time base"
    beat = 1 / float((stream.average_rate or 25) * stream.time_base)
    for number, frame in enumerate(container.decode(stream)):
        deadline.check()
        pts.append(round(number * beat) if frame.pts is None else frame.pts)
    return _Index(pts=pts, keys=[0])


def decode_frames(data: bytes, numbers: Sequence[int], *, name: str, timeout: float) -> Iterator[torch.Tensor]:
    """uint8 [H, W, 3] of each frame asked for, turned upright; `numbers` must not fall."""
    deadline = _Deadline(timeout, name)
    with _opened(data, name) as (container, stream):
        index = _read_index(container, stream, deadline)
        if numbers[-1] >= len(index.pts):
            raise VideoRefused(f"{name}: frame {numbers[-1]} is wanted, but the file has {len(index.pts)}")
        walk: Iterator[tuple[int, Any]] = iter(())
        here, picture, sure = -1, None, False
        for wanted in numbers:
            key = index.keys[bisect.bisect_right(index.keys, wanted) - 1] if index.keys else 0
            if here < 0 or key > here + 1:
                walk, sure = _walk(container, stream, index, key), key == 0
            while here != wanted or picture is None:
                deadline.check()
                here, picture = next(walk, (len(index.pts), None))
                if here > wanted:
                    if sure:
                        raise VideoRefused(f"{name}: frame {wanted} of {len(index.pts)} cannot be decoded")
                    walk, sure = _walk(container, stream, index, 0), True  # some files mark keyframes that are none
            yield torch.from_numpy(_upright(picture))


def _walk(container: InputContainer, stream: VideoStream, index: _Index, key: int) -> Iterator[tuple[int, Any]]:
    """(number, frame) from this keyframe on; frames that the index does not know are passed over."""
    number_of = {pts: number for number, pts in enumerate(index.pts)}
    if key == 0:
        container.seek(0, backward=True)
    else:
        container.seek(index.pts[key], stream=stream, backward=True)
    for place, frame in enumerate(container.decode(stream)):
        number = place if frame.pts is None else number_of.get(frame.pts, -1)
        if number >= 0:
            yield number, frame


def _upright(frame: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB as a player shows it: turned by the file's rotation, which phones write instead of turning pixels."""
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def decode_images(frames: Sequence[bytes], numbers: Sequence[int], *, name: str) -> Iterator[torch.Tensor]:
    """The same for a video given as images."""
    for number in numbers:
        yield decode_image(frames[number], name=f"{name} frame {number}")


def video_patches(
    frames: Iterator[torch.Tensor], *, count: int, grid: tuple[int, int, int], spec: VisionSpec
) -> torch.Tensor:
    """uint8 [patches, 3 * temporal * patch * patch]; each frame is resized as it comes, so memory stays at the grid's.

    An odd frame is paired with itself.
    """
    pairs, rows, columns = grid
    p, m, t = spec.patch, spec.merge, spec.temporal
    clip = torch.empty(pairs * t, 3, rows * p, columns * p, dtype=torch.uint8)
    for at, frame in enumerate(frames):
        clip[at] = resize(frame.permute(2, 0, 1).unsqueeze(0), rows * p, columns * p)[0]
    clip[count:] = clip[count - 1]
    blocks = clip.view(pairs, t, 3, rows // m, m, p, columns // m, m, p)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(pairs * rows * columns, 3 * t * p * p)

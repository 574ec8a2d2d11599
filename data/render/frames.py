"""Decodes video files: their facts, and exactly the frames with given numbers.

The packets are indexed first, without decoding. For each frame, decoding then starts at the last keyframe before it.
Times come from the file and count from the first frame.
"""

from __future__ import annotations

import bisect
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from data.format.facts import VideoFacts
from data.render.image import MAX_PIXELS, decode_image
from data.render.vision import Pixels, VisionSpec, resize

if TYPE_CHECKING:  # imported only where a video is opened: without videos the package is not needed
    from av.container import InputContainer
    from av.video.stream import VideoStream

# no playlists, no image sequences, nothing that opens another file or address
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
# containers with display times in their packets and reliable seeking
_INDEXED = ("mov", "matroska", "flv")
_REGULAR_SECONDS = 0.010  # a frame rate counts as constant when no frame is further from its regular time


Answer = TypeVar("Answer")


class VideoRefused(ValueError):
    """A video that cannot be used as it is; the message names it and gives the reason."""


class VideoUnreadable(VideoRefused):
    """The decoder failed; `reason` is its message."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: not a readable video ({reason})")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class _Index:
    pts: list[int]  # of every frame, in display order
    keys: list[int]  # numbers of the frames that can be decoded on their own
    by_arrival: bool = False  # frames are identified by counting them from the start


def _check_pixels(height: int, width: int, name: str) -> None:
    """Refuse frames that are larger than any image may be."""
    if height * width > MAX_PIXELS:
        raise VideoRefused(f"{name}: frames of {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")


def _deadline(seconds: float, name: str) -> Callable[[], None]:
    """Return a check, to be called often, that raises VideoRefused after this many seconds."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise VideoRefused(
                f"{name}: decoding took longer than data.video.timeout_seconds={seconds:g}; cut the video shorter, "
                f"re-encode it with more keyframes, or raise the limit"
            )

    return check


class Clip:
    """An open video file: its facts, and its frames by number."""

    def __init__(self, container: InputContainer, *, name: str, timeout: float) -> None:
        # a cover picture is a video stream too, but never the best one
        stream = ask_ffmpeg(name, lambda: container.streams.best("video"))
        if not isinstance(stream, _av().VideoStream):
            raise VideoRefused(f"{name}: the file has no video stream")
        self._container, self._stream = container, stream
        self._name = name
        _check_pixels(stream.codec_context.height, stream.codec_context.width, name)
        self._stream.thread_type = "NONE"  # workers are processes; decoder threads would only take their cores
        # av 19 would share one converter, with threads, in this process: a reader forked later would hang on them
        self._converter = _av().video.reformatter.VideoReformatter()
        self._check_time = _deadline(timeout, name)
        indexed = container.format.name.split(",")[0] in _INDEXED
        read = _index_packets if indexed else _index_by_decoding
        self._index = read(container, self._stream, name, self._check_time)
        ask_ffmpeg(name, lambda: container.seek(0, backward=True))
        first = next(_each(name, lambda: container.decode(self._stream)), None)
        if first is None or not self._index.pts:
            raise VideoRefused(f"{name}: no frame can be decoded")
        self._number_of = {pts: number for number, pts in enumerate(self._index.pts)}
        self.facts = _facts(self._upright(first).shape, self._index.pts, self._stream)

    def frames(self, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield these frames as uint8 [H, W, 3], turned upright; `numbers` must not decrease."""
        for number, frame in zip(numbers, self._decode(numbers), strict=True):
            assert frame is not None, f"frame {number} is decoded"
            pixels = self._upright(frame)
            size = (self.facts.height, self.facts.width)
            if pixels.shape[:2] != size:
                raise VideoRefused(
                    f"{self._name}: frame {number} is {pixels.shape[1]} x {pixels.shape[0]} pixels, but the first is "
                    f"{size[1]} x {size[0]}; frames of one video must have one size. Cut it there, or re-encode it"
                )
            yield torch.from_numpy(pixels)

    def _decode(self, numbers: Sequence[int]) -> Iterator[Any]:
        index, name = self._index, self._name
        if numbers[-1] >= len(index.pts):
            raise VideoRefused(f"{name}: frame {numbers[-1]} was requested, but the file has {len(index.pts)}")
        walk: Iterator[tuple[int, Any]] = iter(())
        here, frame = -1, None
        for number in numbers:
            key = index.keys[bisect.bisect_right(index.keys, number) - 1] if index.keys else 0
            if here < 0 or key > here + 1:
                walk = self._walk(key, set(numbers))
            while here != number or frame is None:
                self._check_time()
                try:
                    here, frame = next(walk, (len(index.pts), None))
                except VideoUnreadable as error:
                    words = f"frame {number} of {len(index.pts)} cannot be decoded ({error.reason})"
                    raise VideoRefused(f"{name}: {words}") from error
                if here > number:
                    raise VideoRefused(f"{name}: frame {number} of {len(index.pts)} cannot be decoded")
            yield frame

    def _walk(self, key: int, numbers: set[int]) -> Iterator[tuple[int, Any]]:
        """Yield (number, frame) from this keyframe on; frames not in `numbers` may be skipped."""
        container = self._container
        stream = self._stream
        name = self._name
        if key == 0:
            ask_ffmpeg(name, lambda: container.seek(0, backward=True))
        else:
            ask_ffmpeg(name, lambda: container.seek(self._index.pts[key], stream=stream, backward=True))
        if self._index.by_arrival:
            yield from enumerate(_each(name, lambda: container.decode(stream)))
            return
        context = stream.codec_context
        for packet in _each(name, lambda: container.demux(stream)):
            if context.name == "h264":  # B pictures declare that no frame refers to them: decode them only on demand
                is_needed = packet.pts is None or self._number_of.get(packet.pts) in numbers
                context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            for frame in ask_ffmpeg(name, packet.decode):
                if frame.pts in self._number_of:
                    yield self._number_of[frame.pts], frame

    def _upright(self, frame: Any) -> Pixels:
        """Return RGB as a player shows it. Phones write a rotation into the file instead of turning the pixels."""
        _check_pixels(frame.height, frame.width, self._name)
        turns = round(frame.rotation / 90) % 4
        pixels = ask_ffmpeg(self._name, lambda: self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        return np.ascontiguousarray(np.rot90(pixels, turns))


def _av() -> Any:
    """Import the decoder. If it is missing, do not raise ValueError: that would blame the sample."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading a video file needs the package av, which is not installed: pip install av", name="av"
        ) from error
    return av


@contextmanager
def open_video(data: bytes, *, name: str = "video", timeout: float = 60.0) -> Iterator[Clip]:
    """Open a video file; raise a ValueError that names it if it cannot be read."""
    av = _av()
    container = ask_ffmpeg(name, lambda: av.open(io.BytesIO(data), mode="r", options={"format_whitelist": _FORMATS}))
    with container:
        yield Clip(container, name=name, timeout=timeout)


def probe_video(data: bytes, *, name: str = "video", timeout: float = 60.0) -> VideoFacts:
    """Return the displayed size, the number of frames and their times; decode only the first frame if possible."""
    with open_video(data, name=name, timeout=timeout) as clip:
        return clip.facts


def ask_ffmpeg(name: str, call: Callable[[], Answer]) -> Answer:
    """Return the result of one call to the decoder; any error becomes VideoUnreadable with the same message."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # FFmpeg has a dozen classes of errors, and PyAV adds its own
        raise VideoUnreadable(name, f"{type(error).__name__}: {error}") from error


def _each(name: str, call: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yield the items of a decoder's iterator, each through `ask_ffmpeg`."""
    items = ask_ffmpeg(name, call)
    end = object()
    while (item := ask_ffmpeg(name, lambda: next(items, end))) is not end:
        yield item


def _facts(size: tuple[int, ...], pts: list[int], stream: VideoStream) -> VideoFacts:
    assert stream.time_base is not None, "a stream that was decoded has a time base"
    (height, width, _), tick = size, float(stream.time_base)
    times = [(each - pts[0]) * tick for each in pts]
    n = len(times)
    declared = float(stream.average_rate) if stream.average_rate else 0.0
    beat = times[-1] / (n - 1) if n > 1 else 0.0
    if n == 1 or beat <= 0:
        rate = declared or 1.0
        return VideoFacts(height=height, width=width, frames=n, duration=n / rate, rate=rate)
    # the declared rate is exact even where times are rounded to milliseconds, but some files declare nonsense
    agrees = declared > 0 and abs(times[-1] - (n - 1) / declared) <= max(0.001, tick)
    rate = declared if agrees else 1 / beat
    if all(abs(seconds - number / rate) <= max(_REGULAR_SECONDS, tick) for number, seconds in enumerate(times)):
        return VideoFacts(height=height, width=width, frames=n, duration=n / rate, rate=rate)
    duration = times[-1] * n / (n - 1)
    return VideoFacts(height=height, width=width, frames=n, duration=duration, rate=n / duration, times=tuple(times))


def _index_packets(container: InputContainer, stream: VideoStream, name: str, check_time: Callable[[], None]) -> _Index:
    is_key: dict[int, bool] = {}
    for packet in _each(name, lambda: container.demux(stream)):
        check_time()
        if packet.size and packet.pts is not None and not packet.is_discard:  # an edit list cuts discarded ones off
            is_key[packet.pts] = packet.is_keyframe
    pts = sorted(is_key)
    return _Index(pts=pts, keys=[number for number, each in enumerate(pts) if is_key[each]])


def _index_by_decoding(
    container: InputContainer, stream: VideoStream, name: str, check_time: Callable[[], None]
) -> _Index:
    """Decode every frame once to count them: old containers lack display times or reliable seeking."""
    pts: list[int | None] = []
    for frame in _each(name, lambda: container.decode(stream)):
        check_time()
        pts.append(frame.pts)
    known = [each for each in pts if each is not None]
    if len(known) == len(pts) and all(a < b for a, b in zip(known, known[1:], strict=False)):
        return _Index(pts=known, keys=[0], by_arrival=True)
    assert stream.time_base is not None, "a stream that was decoded has a time base"
    beat = 1 / float((stream.average_rate or 25) * stream.time_base)
    return _Index(pts=[round(number * beat) for number in range(len(pts))], keys=[0], by_arrival=True)


def decode_images(frames: Sequence[bytes], numbers: Sequence[int], *, name: str) -> Iterator[torch.Tensor]:
    """Yield these frames of a video given as images, in the form of `Clip.frames`."""
    for number in numbers:
        yield decode_image(frames[number], name=f"{name} frame {number}")


def video_patches(
    frames: Iterator[torch.Tensor], *, count: int, grid: tuple[int, int, int], spec: VisionSpec
) -> torch.Tensor:
    """Return the patches of a video, uint8 [patches, 3 * temporal * patch * patch]; a last odd frame is repeated.

    Each frame is resized as it arrives, so memory is bounded by the size of the grid.
    """
    pairs, rows, columns = grid
    p, m = spec.patch, spec.merge
    t = spec.temporal
    patches = torch.empty(pairs, rows // m, columns // m, m, m, t, p, p * 3, dtype=torch.uint8)
    by_frame = patches.permute(0, 5, 1, 3, 6, 2, 4, 7)
    for at, frame in enumerate(frames):
        resized = resize(frame, rows * p, columns * p)
        by_frame[at // t, at % t] = resized.reshape(rows // m, m, p, columns // m, m, p * 3)
    for at in range(count, pairs * t):
        by_frame[at // t, at % t] = by_frame[(count - 1) // t, (count - 1) % t]
    return patches.view(pairs * rows * columns, 3 * t * p * p)

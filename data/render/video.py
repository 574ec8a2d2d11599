"""Plans which frames of a video are used, and their size, from the facts in the index.

For a constant frame rate the frames, sizes and times equal those of transformers; where the rate varies, frames are
chosen by their real times. data/render/frames.py decodes exactly the frames planned here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.config import VideoConfig
from data.format.facts import ImageFacts, VideoFacts
from data.format.media import VideoRef
from data.render.vision import VisionSpec, check_aspect

Grid = tuple[int, int, int]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """The numbers of the frames to decode, in order, the grid of their patches, and the time of each pair."""

    frames: tuple[int, ...]
    grid: Grid
    stamps: tuple[float, ...]  # seconds, one per frame pair
    note: str = ""  # for the user, if there are fewer frames than requested


def plan_video(ref: VideoRef, facts: VideoFacts, *, spec: VisionSpec, config: VideoConfig) -> VideoPlan:
    """Plan one video of a record. The facts of the index and of the decoded file give the same plan."""
    times = _times(ref, facts)
    start, end = ref.start or 0.0, math.inf if ref.end is None else ref.end
    inside = np.flatnonzero((times >= start) & (times < end))
    if not len(inside):
        raise ValueError(
            f"no frame lies between {start:g} and {end:g} s: the video has {facts.frames} frames from {times[0]:g} to "
            f"{times[-1]:g} s. Change start and end"
        )
    regular = facts.times is None and not ref.times
    count, note = _how_many(ref, times[inside], facts, regular=regular, config=config)
    frames = _choose(inside, times, count, regular=regular)
    if len(frames) == 1:
        if config.single_frame == "refuse":
            raise ValueError(
                "only one frame is used, but a video needs two; make it an image, or set data.video.single_frame=double"
            )
        frames *= 2
    origin = start if ref.time_origin == "clip" else 0.0
    even = frames + frames[-1:] * (len(frames) % spec.temporal)
    seconds = (times[even] - origin).tolist()
    return VideoPlan(
        frames=tuple(frames),
        grid=video_grid(
            len(frames), facts.height, facts.width, max_frame_pixels=ref.max_pixels, spec=spec, config=config
        ),
        stamps=tuple((a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True)),
        note=note,
    )


def check_video(config: VideoConfig, *, spec: VisionSpec) -> None:
    """Refuse settings that no video can satisfy, including the sizes in `data.video`."""
    for name in ("fps", "min_frames", "max_frames", "timeout_seconds"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"data.video.{name} must be a finite number above 0, got {value}")
    if config.min_frames > config.max_frames:
        raise ValueError(
            f"data.video.min_frames is {config.min_frames}, above data.video.max_frames, {config.max_frames}; "
            f"lower min_frames or raise max_frames"
        )
    clip_limits(2, spec=spec, config=config)


def frame_list_facts(ref: VideoRef, frames: Sequence[ImageFacts]) -> VideoFacts:
    """Return the facts of a video given as images, which must all have one size; the record gives the times."""
    sizes = {(frame.height, frame.width) for frame in frames}
    if len(sizes) != 1:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
        raise ValueError(f"the frames of a video must have one size, found {shown} pixels")
    if ref.rate is not None:
        rate, duration = ref.rate, len(frames) / ref.rate
    else:
        duration = _span(np.array(ref.times))
        rate = len(frames) / duration
    height, width = sizes.pop()
    return VideoFacts(height=height, width=width, frames=len(frames), duration=duration, rate=rate)


def _times(ref: VideoRef, facts: VideoFacts) -> Floats:
    """Return the seconds from the first frame to each frame."""
    known = ref.times or facts.times
    return np.array(known) if known else np.arange(facts.frames) / (ref.rate or facts.rate)


def _span(times: Floats) -> float:
    """Return the seconds that frames are shown: the last as long as the mean of the others, a single one for 1 s."""
    if len(times) < 2:
        return 1.0
    return float(times[-1] - times[0]) * len(times) / (len(times) - 1)


def _how_many(
    ref: VideoRef, times: Floats, facts: VideoFacts, *, regular: bool, config: VideoConfig
) -> tuple[int, str]:
    total = len(times)
    most = min(config.max_frames if ref.max_frames is None else ref.max_frames, total)
    if ref.frames and ref.fps is None and ref.num_frames is None:  # a list of frames is already sampled
        requested, least = total, 0
    elif ref.num_frames is not None:
        requested, least = ref.num_frames, 0
    else:
        fps = config.fps if ref.fps is None else ref.fps
        requested = int(total / (ref.rate or facts.rate) * fps) if regular else int(_span(times) * fps)
        least = config.min_frames
    chosen = max(1, min(max(requested, least), most))
    if chosen == most < min(requested, total):
        seconds = total / facts.rate if regular else _span(times)
        return chosen, f"{chosen} frames of {seconds:.0f} s instead of {requested}, because max_frames is {most}"
    return chosen, ""


def _choose(inside: Ints, times: Floats, count: int, *, regular: bool) -> list[int]:
    if regular or count == len(inside):
        chosen = np.linspace(0, len(inside) - 1, count).round().astype(np.int64)
    else:
        seconds = times[inside]
        aims = np.linspace(seconds[0], seconds[-1], count)
        after = np.clip(np.searchsorted(seconds, aims), 1, len(inside) - 1)
        chosen = np.unique(np.where(aims - seconds[after - 1] <= seconds[after] - aims, after - 1, after))
    return [int(number) for number in inside[chosen]]


def video_grid(
    frames: int, height: int, width: int, *, max_frame_pixels: int | None, spec: VisionSpec, config: VideoConfig
) -> Grid:
    """Return (frame pairs, patch rows, patch columns) of a clip with this many frames of this size."""
    low, high = clip_limits(frames, spec=spec, config=config)
    if max_frame_pixels is not None:
        high = min(high, max(max_frame_pixels, spec.factor**2) * frames)
        low = min(low, high)
    fit_h, fit_w = _fit(frames, height, width, low=low, high=high, spec=spec)
    return math.ceil(frames / spec.temporal), fit_h // spec.patch, fit_w // spec.patch


def clip_limits(frames: int, *, spec: VisionSpec, config: VideoConfig) -> tuple[int, int]:
    """Return (min, max) of frames x height x width."""
    per_token = spec.temporal * spec.factor**2
    low = spec.video_min_pixels if config.min_tokens is None else config.min_tokens * per_token
    high = spec.video_max_pixels if config.max_tokens is None else config.max_tokens * per_token
    if not 0 < low <= high:
        raise ValueError(
            f"data.video.min_tokens is {low // per_token} and data.video.max_tokens is {high // per_token}; they must "
            f"satisfy 1 <= min_tokens <= max_tokens (the base gives those that are not set)"
        )
    if config.frame_cap:
        if config.max_tokens_per_frame < 1:
            raise ValueError(f"data.video.max_tokens_per_frame must be at least 1, got {config.max_tokens_per_frame}")
        of_frame = min(config.max_tokens_per_frame * spec.factor**2, high // frames)
        high = max(of_frame, int(low * 1.05)) * frames
    return low, high


def _fit(frames: int, height: int, width: int, *, low: int, high: int, spec: VisionSpec) -> tuple[int, int]:
    factor = spec.factor
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(height, width)
    fit_h, fit_w = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / spec.temporal) * spec.temporal * fit_h * fit_w
    if volume > high:
        shrink = math.sqrt(frames * height * width / high)
        fit_h = max(factor, math.floor(height / shrink / factor) * factor)
        fit_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < low:
        grow = math.sqrt(low / (frames * height * width))
        fit_h = math.ceil(height * grow / factor) * factor
        fit_w = math.ceil(width * grow / factor) * factor
    return fit_h, fit_w

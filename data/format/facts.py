"""Facts about an image or a video that an index stores, so that it need not be decoded again. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Size of one image in pixels, after EXIF orientation."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """Size, length and timing of one video stream, after rotation."""

    height: int
    width: int
    frames: int
    duration: float  # seconds
    rate: float  # average frames per second
    times: tuple[float, ...] | None = None  # seconds of each frame; only where the frame rate varies


@dataclass(frozen=True, kw_only=True)
class VisionCount:
    """Cost of the media of one sample: tokens that stand for patches in the row, and patches in the tower."""

    tokens: int = 0
    patches: int = 0

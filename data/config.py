"""The `data:` section. Loads no torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named source of samples: `data.sources.<name>`."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is packed. Every quantity is global: none changes with the number of ranks."""

    packs_per_step: int = 32
    tokens_per_pack: int = 8192
    sources: dict[str, SourceConfig] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How large an image may be, in tokens: `data.image`. One token is 32 x 32 pixels in every model of the family."""

    min_tokens: int | None = None  # None: the base's own limit (preprocessor_config.json), 64 as released
    max_tokens: int | None = None  # None: the base's own limit, 16384 as released


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Which frames of a video are seen, how large, and how they are written into the text: `data.video`."""

    fps: float = 2.0  # frames sampled per second, unless the record says otherwise
    min_frames: int = 4
    max_frames: int = 768
    min_tokens: int | None = None  # of a whole video; None: the base's own limit, 2 as released
    max_tokens: int | None = None  # of a whole video; None: the base's own limit, 12288 as released
    frame_cap: bool = True  # the reference's rule; transformers leaves it off unless `cap_pixels_per_frame` is passed
    max_tokens_per_frame: int = 768  # of one frame, where frame_cap is on; a frame pair becomes one such grid
    timestamps: Literal["seconds", "hms", "mixed"] = "seconds"  # <3.0 seconds>, <00:00:03>, or either by sample
    layout: Literal["nested", "flat"] = "nested"  # transformers >= 5 or 4.57; the server must use the same
    single_frame: Literal["double", "refuse"] = "double"  # a video needs two frames
    timeout_seconds: float = 60.0  # for decoding one video


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations become text: `data.chat`. The template itself is the base's own."""

    thinking: Literal["train", "mask", "drop"] = "train"  # mask: in the text, but without loss
    keep_control_tokens: tuple[str, ...] = ()  # spelled in an assistant's text, they stay control tokens: <|box_start|>

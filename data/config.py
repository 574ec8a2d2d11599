"""The `data:` section. Loads no torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named source of samples: `data.sources.<name>`."""

    path: str  # shards (a tar, a folder, a pattern), or a .jsonl / .json file, which is converted once
    weight: float = 1.0  # share beside the other sources, in the unit of data.mixture


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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is packed. Every quantity is global: none changes with the number of ranks."""

    packs_per_step: int = 32  # LoRA bears large batches badly (LoRA Without Regret); the authors have 16 on each GPU
    tokens_per_pack: int = 8192
    vision_tokens_per_pack: int | None = None  # of images and videos; None: only tokens_per_pack limits them
    mixture: Literal["natural", "tokens", "samples"] = "natural"  # natural: each sample once an epoch, no weights
    overlong: Literal["error", "skip", "split-turns"] = "error"  # a sample that does not fit a pack
    remainder: Literal["drop", "keep"] = "drop"  # packs left over by the last step of an epoch
    balance_steps: int = 32  # steps among which packs of similar cost are put together; 0: packs are only shuffled
    pad_multiple: int = 1  # rows are padded to a multiple of this many tokens
    workers: int = 2  # processes that read for each rank; 0: the rank reads by itself
    prefetch: int = 2  # packs that each worker holds ready
    max_bad_samples: int = 100  # unusable ones and those that fail while they are read; more stop the run
    # a pack that takes longer stops the run with the names of its shards; 0: wait forever
    stall_seconds: float = 420.0
    # where relative paths of media start, and what none leaves; empty: at the shards' folder, and anywhere
    media_root: str = ""
    # urls of media may name addresses that are not public: whoever writes a row chooses what this machine asks
    allow_private_addresses: bool = False
    cache_dir: str = ""  # where indexes and converted files go when not beside the data
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)

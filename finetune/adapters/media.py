"""Compare and rewrite the processor files that decide how images and videos become grids.

transformers and the servers read these files. If a merged model kept its base's files, it could see larger or smaller
images, or other frames, than the adapter was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data.config import DataConfig, VideoConfig
from data.render.video import clip_limits
from data.render.vision import IMAGE_FILE, VIDEO_FILE, image_limits, processor_settings, read_spec
from finetune.adapters.keys import CARD
from finetune.files.jsonblock import load_json
from finetune.settings.recipes import load_recipe

HEADING = "## How images and videos were prepared in training\n"
_NESTED = "processor_config.json"
_SECTIONS = {"image_processor": IMAGE_FILE, "video_processor": VIDEO_FILE}
_READ = ("image", "video", "chat")
_FRAME_RULES = {"fps": "fps", "min_frames": "min_frames", "max_frames": "max_frames"}
_CAP = {"frame_cap": "cap_pixels_per_frame", "max_tokens_per_frame": "max_video_tokens"}
_UNSAID = {
    "frame_cap": "a reader that does not know `cap_pixels_per_frame` follows its own rules",
    "max_tokens_per_frame": "a reader that does not know `max_video_tokens` follows its own rules",
    "timestamps": "no file can say this; servers write `<3.0 seconds>`, so write the prompt yourself",
    "layout": "no file can say this; transformers 5 writes nested, 4.57 flat",
    "single_frame": "no file can say this; keep videos of one frame away from the model",
}
"""Settings that processor files cannot express, or that only some readers obey."""


@dataclass(frozen=True, kw_only=True)
class MediaRules:
    """Settings that processor files can express; pixels are (min, max), of one image or of all frames of a video."""

    image_pixels: tuple[int, int]
    video_pixels: tuple[int, int]
    fps: float
    min_frames: int
    max_frames: int
    frame_cap: bool
    max_tokens_per_frame: int

    def differences(self, other: MediaRules) -> list[str]:
        """Return a clause for each rule that differs in `other`."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [f"{name} {_text(mine)}, not {_text(theirs)}" for name, mine, theirs in pairs if mine != theirs]


def _text(value: Any) -> str:
    return f"{value[0]:,} to {value[1]:,}" if isinstance(value, tuple) else str(value)


def trained_data(config: Mapping[str, Any], where: str) -> DataConfig:
    """Return the media and chat settings of a recorded configuration, with defaults for missing keys."""
    data = config.get("data", {})
    read = {key: data[key] for key in _READ if key in data} if isinstance(data, dict) else data
    settings, problems = load_recipe("", below=({"data": read}, where))
    if problems:
        raise ValueError("\n".join(map(str, problems)))
    return settings.data


def rules_of(folder: Path) -> MediaRules:
    """Return the rules in a model folder's processor files, with the reference's rules for missing frame settings."""
    spec, video = read_spec(folder), processor_settings(folder, "video_processor", VIDEO_FILE)
    default = VideoConfig()
    values = {
        name: video.take(key, (int, float, bool), getattr(default, name))
        for name, key in {**_FRAME_RULES, **_CAP}.items()
    }
    return _comparable(
        MediaRules(
            image_pixels=(spec.image_min_pixels, spec.image_max_pixels),
            video_pixels=(spec.video_min_pixels, spec.video_max_pixels),
            **values,
        )
    )


def trained_rules(base: Path, data: DataConfig) -> MediaRules:
    """Return the rules by which training prepared images and videos on this base."""
    spec, video = read_spec(base), data.video
    return _comparable(
        MediaRules(
            image_pixels=image_limits(spec, data.image),
            video_pixels=clip_limits(1, spec=spec, config=replace(video, frame_cap=False)),
            **{name: getattr(video, name) for name in (*_FRAME_RULES, *_CAP)},
        )
    )


def _comparable(rules: MediaRules) -> MediaRules:
    """The same rules, without the limit of tokens per frame if frames are not capped."""
    return rules if rules.frame_cap else replace(rules, max_tokens_per_frame=VideoConfig().max_tokens_per_frame)


def media_files(base: Path, data: DataConfig, *, title: str) -> dict[str, bytes]:
    """Return the small files of the base that a model trained with `data` needs changed: processor files and README.

    Files that need no change are left out. `title` starts the README if the base has none.
    """
    files = processor_files(base, data)
    before = (base / CARD).read_bytes() if (base / CARD).is_file() else b""
    head, mark, _ = before.partition(HEADING.encode())
    section = media_section(data)
    if section or mark:
        files[CARD] = (head or title.encode()).rstrip() + b"\n\n" + section.encode()
    return files


def processor_files(base: Path, data: DataConfig) -> dict[str, bytes]:
    """Return the base's processor files that must change so that readers prepare media as training did."""
    now, trained = rules_of(base), trained_rules(base, data)
    changes: dict[str, dict[str, Any]] = {}
    if now.image_pixels != trained.image_pixels:
        changes["image_processor"] = _size(trained.image_pixels)
    if replace(now, image_pixels=trained.image_pixels) != trained:
        rules = {key: getattr(trained, name) for name, key in _FRAME_RULES.items() if _differs(now, trained, name)}
        rules |= {key: getattr(trained, name) for name, key in _CAP.items()}
        changes["video_processor"] = _size(trained.video_pixels) | rules
    files: dict[str, dict[str, Any]] = {}
    for section, values in changes.items():
        for name in (_SECTIONS[section], _NESTED):  # which of the two is read depends on the reader's version
            content = files.get(name) or (load_json(base / name) if (base / name).is_file() else {})
            settings = content.get(section) if name == _NESTED else content
            if settings:
                _lay_over(settings, values)
                files[name] = content
    return {
        name: (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode() for name, content in files.items()
    }


def _differs(now: MediaRules, trained: MediaRules, name: str) -> bool:
    return bool(getattr(now, name) != getattr(trained, name))


def _size(pixels: tuple[int, int]) -> dict[str, Any]:
    return {"size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]}}


def _lay_over(settings: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put values into a processor's settings, and into the older spellings of its limits if present."""
    for older, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if settings.get(older) is not None:
            settings[older] = values["size"][edge]
    settings |= {**values, "size": (settings.get("size") or {}) | values["size"]}


def media_section(data: DataConfig) -> str:
    """Return the README section on the settings that differ from the published models; empty if none do."""
    lines = []
    for name, config in (("image", data.image), ("video", data.video)):
        for field in fields(config):
            value = getattr(config, field.name)
            if value != field.default and field.name != "timeout_seconds":
                unsaid = _UNSAID.get(field.name, "")
                lines.append(f"- `data.{name}.{field.name}`: {value}{f' ({unsaid})' if unsaid else ''}")
    if not lines:
        return ""
    return "\n".join([HEADING, *lines, "", _MEANING])


_MEANING = f"""\
A token covers 32 x 32 pixels of an image, or of two frames of a video. A server must prepare media in the same way, or
the model sees other grids than in training. Servers read sizes and frame rules from `{IMAGE_FILE}` and
`{VIDEO_FILE}` in the folder that they load. A merged folder (`moetune merge`) has the values of training, but
the base of an adapter has its own. `moetune serve-check` compares a server with training.
"""

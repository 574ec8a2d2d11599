"""Turns images into uint8 patches with the base's own resizing and patch order, in plain torch.

The result equals that of transformers' torchvision image processor bit for bit, without torchvision and without its
float32 copy. Until `normalise` on the device, patches stay uint8, and an image has one frame instead of the two equal
ones that the tower needs. A patch is ordered (frame, row, column, channel), as pixels are decoded: cutting complete
lines is six times faster than cutting channel by channel. Patches follow the merge blocks, whose four patches become
one token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data.config import ImageConfig
from data.format.fields import Fields
from data.render.base_file import read_object

MAX_ASPECT = 200
IMAGE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """Sizes from the base's processor files. Pixel limits apply to one image, or to all frames of a video together."""

    patch: int = 16
    merge: int = 2
    temporal: int = 2
    image_min_pixels: int = 65536
    image_max_pixels: int = 16777216
    video_min_pixels: int = 4096
    video_max_pixels: int = 25165824

    @property
    def factor(self) -> int:
        """Sides of resized images are multiples of this; its square is the number of pixels behind one token."""
        return self.patch * self.merge


def read_spec(folder: Path) -> VisionSpec:
    """Read the base's own sizes. The class defaults of transformers fit no released model, so they are never used."""
    image = processor_settings(folder, "image_processor", IMAGE_FILE)
    video = processor_settings(folder, "video_processor", VIDEO_FILE)
    for name, settings in (("image", image), ("video", video)):
        for key, needed in (("image_mean", [0.5] * 3), ("image_std", [0.5] * 3), ("resample", 3)):
            value = settings.take(key, (list, int), needed)
            if value != needed:
                raise ValueError(
                    f"{folder}: the {name} processor's {key} is {value}; moetune prepares pixels as Qwen3-VL "
                    f"does, so it must be {needed}. Use a Qwen3-VL base."
                )
    image_min, image_max = _pixel_limits(folder, "image", image)
    video_min, video_max = _pixel_limits(folder, "video", video)
    return VisionSpec(
        patch=image.whole("patch_size", 16),
        merge=image.whole("merge_size", 2),
        temporal=image.whole("temporal_patch_size", 2),
        image_min_pixels=image_min,
        image_max_pixels=image_max,
        video_min_pixels=video_min,
        video_max_pixels=video_max,
    )


def processor_settings(folder: Path, section: str, file: str) -> Fields:
    """Return one processor's settings, from the nested file of newer releases or from its own file."""
    nested = folder / "processor_config.json"
    if nested.is_file():
        settings = read_object(nested).take(section, dict, None)
        if settings is not None:
            return Fields(settings, f"{nested}: {section}")
    if not (folder / file).is_file():
        raise ValueError(
            f"{folder}: there is neither {file} nor a processor_config.json with `{section}`, so the base's image "
            f"sizes are unknown. Copy {file} from the release the weights came from."
        )
    return read_object(folder / file)


def _pixel_limits(folder: Path, name: str, settings: Fields) -> tuple[int, int]:
    size = Fields(settings.take("size", dict, {}), f"{settings.where}size")
    low = size.whole("shortest_edge", settings.whole("min_pixels"))
    high = size.whole("longest_edge", settings.whole("max_pixels"))
    if low is None or high is None:
        raise ValueError(
            f"{folder}: the {name} processor gives no `size.shortest_edge` and `size.longest_edge`. "
            f"Copy the file from the release the weights came from."
        )
    return int(low), int(high)


def image_limits(spec: VisionSpec, config: ImageConfig, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Return (min, max) pixels of an image, from `data.image` or the base; `max_pixels` is the record's own maximum."""
    per_token = spec.factor**2
    low = spec.image_min_pixels if config.min_tokens is None else config.min_tokens * per_token
    high = spec.image_max_pixels if config.max_tokens is None else config.max_tokens * per_token
    if not per_token <= low <= high:
        raise ValueError(
            f"data.image.min_tokens is {low // per_token} and data.image.max_tokens is {high // per_token}; they must "
            f"satisfy 1 <= min_tokens <= max_tokens (the base gives those that are not set)"
        )
    if max_pixels is not None:
        high = max(max_pixels, per_token)
        low = min(low, high)
    return low, high


def fit_image(height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """Return the size to resize an image to: multiples of `factor`, area within the limits, nearly the same aspect."""
    check_aspect(height, width)
    fit_h, fit_w = round(height / factor) * factor, round(width / factor) * factor
    if fit_h * fit_w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fit_h = max(factor, math.floor(height / shrink / factor) * factor)
        fit_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif fit_h * fit_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fit_h = math.ceil(height * grow / factor) * factor
        fit_w = math.ceil(width * grow / factor) * factor
    return fit_h, fit_w


def check_aspect(height: int, width: int) -> None:
    """Refuse a side more than 200 times the other, as the model family does."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other; crop it")


def image_grid(height: int, width: int, *, limits: tuple[int, int], spec: VisionSpec) -> tuple[int, int, int]:
    """Return (1, patch rows, patch columns) of an image of this size."""
    fit_h, fit_w = fit_image(height, width, min_pixels=limits[0], max_pixels=limits[1], factor=spec.factor)
    return 1, fit_h // spec.patch, fit_w // spec.patch


def grid_tokens(grid: tuple[int, int, int], spec: VisionSpec) -> int:
    """Return the number of tokens of a grid of patches."""
    return grid[0] * grid[1] * grid[2] // spec.merge**2


def resize(rgb_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 pixels to uint8: bicubic with antialiasing, the same kernel as torchvision's resize."""
    if rgb_HWC.shape[:2] == (height, width):
        return rgb_HWC
    planes = rgb_HWC.unsqueeze(0).permute(0, 3, 1, 2)  # in this order, so that the kernel sees channels-last pixels
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0)


def image_patches(rgb_HWC: torch.Tensor, *, grid: tuple[int, int, int], spec: VisionSpec) -> torch.Tensor:
    """Resize a decoded image to its grid and return its patches, uint8 [patches, 3 * patch * patch]."""
    _, rows, columns = grid
    p, m = spec.patch, spec.merge
    resized = resize(rgb_HWC, rows * p, columns * p)
    lines = resized.reshape(rows // m, m, p, columns // m, m, p * 3)
    return lines.permute(0, 3, 1, 4, 2, 5).reshape(rows * columns, 3 * p * p)


def unpatch(patches: Pixels, grid: Sequence[int], spec: VisionSpec) -> Pixels:
    """Put the patches of one image or video back together, as uint8 [frames, H, W, 3]."""
    pairs, rows, columns = (int(side) for side in grid)
    m, p = spec.merge, spec.patch
    frames = patches.shape[1] // (3 * p * p)
    blocks = patches.reshape(pairs, rows // m, columns // m, m, m, frames, p, p, 3)
    return blocks.transpose(0, 5, 1, 3, 6, 2, 4, 7, 8).reshape(pairs * frames, rows * p, columns * p, 3)


def normalise(patches: torch.Tensor, *, spec: VisionSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Turn uint8 patches of images or videos into the tower's rows [patches, 3 * temporal * patch * patch] in [-1, 1].

    Image rows have one frame; the tower needs `temporal` equal ones. Runs on the device of the patches.
    """
    area = spec.patch**2
    frames = patches.shape[1] // (3 * area)
    assert patches.shape[1] == 3 * area * frames, f"patch rows of {patches.shape[1]} values, not {3 * area} per frame"
    assert frames in (1, spec.temporal), f"patch rows of {frames} frames are neither an image's nor a video's"
    scaled = ((patches.to(torch.float32) - 127.5) / 127.5).to(dtype)
    by_channel = scaled.view(-1, frames, area, 3).permute(0, 3, 1, 2)
    return by_channel.expand(-1, -1, spec.temporal, -1).reshape(-1, 3 * spec.temporal * area)

"""Images to uint8 patches: the base's own resizing and patch order, in plain torch.

The result is bit for bit what transformers' torchvision image processor computes, without torchvision and without the
float32 detour: patches stay uint8, one copy instead of the two equal frames the tower wants, until `normalise` on the
device. Until then a patch is ordered (frame, row, column, channel), as pixels are decoded: it is cut in whole lines,
six times faster than channel by channel. Patches run through the merge blocks: each four neighbours become one token.
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
    """What the base's processor files say about sizes; pixels are of one image, and of a whole clip for video."""

    patch: int = 16
    merge: int = 2
    temporal: int = 2
    image_min_pixels: int = 65536
    image_max_pixels: int = 16777216
    video_min_pixels: int = 4096
    video_max_pixels: int = 25165824

    @property
    def factor(self) -> int:
        """Sides are multiples of this; its square is the pixels behind one token."""
        return self.patch * self.merge


def read_spec(folder: Path) -> VisionSpec:
    """The base's own sizes. transformers' class defaults differ from every released model: they are never used."""
    image = processor_settings(folder, "image_processor", IMAGE_FILE)
    video = processor_settings(folder, "video_processor", VIDEO_FILE)
    for name, settings in (("image", image), ("video", video)):
        for key, needed in (("image_mean", [0.5] * 3), ("image_std", [0.5] * 3), ("resample", 3)):
            value = settings.take(key, (list, int), needed)
            if value != needed:
                raise ValueError(
                    f"{folder}: the {name} processor's {key} is {value}; moetune prepares pixels as Qwen3-VL "
                    f"does, which needs {needed}. Use a Qwen3-VL base."
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
    """One processor's settings: from the one nested file newer releases save, else from its own file."""
    nested = folder / "processor_config.json"
    if nested.is_file():
        settings = read_object(nested).take(section, dict, None)
        if settings is not None:
            return Fields(settings, f"{nested}: {section}")
    if not (folder / file).is_file():
        raise ValueError(
            f"{folder}: neither {file} nor processor_config.json with `{section}` is there, so the base's image sizes "
            f"are unknown. Copy {file} from the release the weights came from."
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
    """(min, max) pixels of one image: the base's, `data.image`'s, or for the maximum the record's own `max_pixels`."""
    per_token = spec.factor**2
    low = spec.image_min_pixels if config.min_tokens is None else config.min_tokens * per_token
    high = spec.image_max_pixels if config.max_tokens is None else config.max_tokens * per_token
    if not per_token <= low <= high:
        raise ValueError(
            f"data.image.min_tokens is {low // per_token} and data.image.max_tokens {high // per_token}: "
            f"1 <= min_tokens <= max_tokens is needed (unset ones are the base's)"
        )
    if max_pixels is not None:
        high = max(max_pixels, per_token)
        low = min(low, high)
    return low, high


def fit_image(height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """The size an image is resized to: sides multiples of `factor`, area within the limits, aspect nearly kept."""
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
    """Refuses what the model family refuses: a side more than 200 times the other."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other; crop it")


def image_grid(height: int, width: int, *, limits: tuple[int, int], spec: VisionSpec) -> tuple[int, int, int]:
    """(1, patch rows, patch columns) of an image of this size, without its pixels."""
    fit_h, fit_w = fit_image(height, width, min_pixels=limits[0], max_pixels=limits[1], factor=spec.factor)
    return 1, fit_h // spec.patch, fit_w // spec.patch


def grid_tokens(grid: tuple[int, int, int], spec: VisionSpec) -> int:
    """Tokens a grid of patches takes in the text."""
    return grid[0] * grid[1] * grid[2] // spec.merge**2


def resize(rgb_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 in, uint8 out: bicubic with antialiasing, the kernel torchvision's resize calls."""
    if rgb_HWC.shape[:2] == (height, width):
        return rgb_HWC
    planes = rgb_HWC.unsqueeze(0).permute(0, 3, 1, 2)  # in this order, or the kernel does not see whole pixels
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0)


def image_patches(rgb_HWC: torch.Tensor, *, grid: tuple[int, int, int], spec: VisionSpec) -> torch.Tensor:
    """uint8 [patches, 3 * patch * patch] of one decoded image, resized to what its grid says."""
    _, rows, columns = grid
    p, m = spec.patch, spec.merge
    resized = resize(rgb_HWC, rows * p, columns * p)
    lines = resized.reshape(rows // m, m, p, columns // m, m, p * 3)
    return lines.permute(0, 3, 1, 4, 2, 5).reshape(rows * columns, 3 * p * p)


def unpatch(patches: Pixels, grid: Sequence[int], spec: VisionSpec) -> Pixels:
    """uint8 [frames, H, W, 3] of one image or video: puts patches back where `image_patches` took them from."""
    pairs, rows, columns = (int(side) for side in grid)
    m, p = spec.merge, spec.patch
    frames = patches.shape[1] // (3 * p * p)
    blocks = patches.reshape(pairs, rows // m, columns // m, m, m, frames, p, p, 3)
    return blocks.transpose(0, 5, 1, 3, 6, 2, 4, 7, 8).reshape(pairs * frames, rows * p, columns * p, 3)


def normalise(patches: torch.Tensor, *, spec: VisionSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 patches of images or of videos to the tower's rows [patches, 3 * temporal * patch * patch] in [-1, 1].

    Image rows hold one frame; the tower wants `temporal` equal ones. Runs where the patches are: on the device.
    """
    area = spec.patch**2
    frames = patches.shape[1] // (3 * area)
    assert patches.shape[1] == 3 * area * frames, f"patch rows of {patches.shape[1]} values are no {spec.patch} square"
    assert frames in (1, spec.temporal), f"patch rows of {frames} frames are neither an image's nor a video's"
    scaled = ((patches.to(torch.float32) - 127.5) / 127.5).to(dtype)
    by_channel = scaled.view(-1, frames, area, 3).permute(0, 3, 1, 2)
    return by_channel.expand(-1, -1, spec.temporal, -1).reshape(-1, 3 * spec.temporal * area)

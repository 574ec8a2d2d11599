"""Bytes of an image to pixels, upright and RGB. Pillow and simplejpeg are called here, and for writing in clean.py."""

import io
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data.format.facts import ImageFacts
from data.render.vision import Pixels

MAX_PIXELS = 100_000_000
"""Of one image or frame: judged by its header, before anything is decoded. The largest base sees 17 million."""

# what data sets hold; other readers of Pillow's start programs (EPS) or were never meant for strangers' files
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # MPO, a phone's photo with a preview behind it, is one picture
_ORIENTATION = 0x0112
# steps over rows and columns for each orientation, those from 5 on after exchanging rows and columns
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}

Answer = TypeVar("Answer")

# Pillow's own limit, 89 million, only warns: what is above ours is refused by name
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageRefused(ValueError):
    """An image that cannot be used as it is; the message says which and why."""


def ask_pillow(name: str, call: Callable[[], Answer]) -> Answer:
    """The answer of one call to the decoders; whatever they raise becomes ImageRefused, with their words."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # their errors have no common base class, and grow with each release
        # Pillow's own words name an address in memory, another one each time
        reason = "its bytes are of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageRefused(f"{name}: not a readable image ({type(error).__name__}: {reason})") from error


def probe_image(data: bytes, *, name: str = "image") -> ImageFacts:
    """The size decode_image will return; refuses what it refuses, except broken pixel data."""
    image = open_image(data, name)
    # Pillow turns a TIFF by itself, and says its size as turned
    if image.format != "TIFF" and orientation(image, name) in (5, 6, 7, 8):
        return ImageFacts(height=image.width, width=image.height)
    return ImageFacts(height=image.height, width=image.width)


def decode_image(data: bytes, *, name: str) -> torch.Tensor:
    """uint8 [H, W, 3]: turned upright by its EXIF orientation, transparency laid over white, 16 bits scaled to 8."""
    image = open_image(data, name)
    fast = _fast_jpeg(data, image, name)
    return torch.from_numpy(_to_rgb(upright(image, name), name) if fast is None else fast)


def open_image(data: bytes, name: str) -> Image.Image:
    """The image by its header: of a known format, one frame, no more than MAX_PIXELS, in a mode with a range."""
    image: Image.Image = ask_pillow(name, lambda: Image.open(io.BytesIO(data), formats=_FORMATS))
    if image.width * image.height > MAX_PIXELS:
        raise ImageRefused(
            f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded. Make it smaller"
        )
    frames = ask_pillow(name, lambda: getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1
    if frames > 1:
        raise ImageRefused(f"{name}: a {image.format} of {frames} frames; keep one frame, or convert it to a video")
    if image.mode not in (*_EIGHT_BIT, *_SIXTEEN_BIT):
        raise ImageRefused(
            f"{name}: pixel format {image.mode} has no fixed range or no defined way to RGB; "
            f"convert it to 8 or 16 bits, grey or RGB ({', '.join((*_EIGHT_BIT, *_SIXTEEN_BIT[:1]))} are read)"
        )
    return image


def orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation; 1, which is upright, where none is given."""
    value: Any = ask_pillow(name, lambda: image.getexif().get(_ORIENTATION, 1))
    return value if isinstance(value, int) else 1


def upright(image: Image.Image, name: str) -> Image.Image:
    """The decoded image, turned as its EXIF orientation says."""
    turned: Image.Image = ask_pillow(name, lambda: ImageOps.exif_transpose(image))
    ask_pillow(name, turned.load)
    return turned


def _fast_jpeg(data: bytes, image: Image.Image, name: str) -> Pixels | None:
    """The pixels Pillow would give, in half the time; None where it must be asked: CMYK, and damage it may survive."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    try:
        pixels: Pixels = ask_pillow(name, lambda: simplejpeg.decode_jpeg(data, colorspace="RGB"))
    except ImageRefused:
        return None
    number = orientation(image, name)
    if number in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = _FLIPS.get(number, (1, 1))
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _to_rgb(image: Image.Image, name: str) -> Pixels:
    if image.mode in _SIXTEEN_BIT:  # Pillow's own conversion clips at 255: every bright pixel white
        wide = np.asarray(image).astype(np.uint32)
        return np.repeat(((wide * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        clear = ask_pillow(name, lambda: image.convert("RGBA"))
        image = Image.alpha_composite(white, clear)
    rgb = ask_pillow(name, lambda: image.convert("RGB"))
    return np.array(rgb)

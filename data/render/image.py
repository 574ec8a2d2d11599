"""Decodes images to upright RGB pixels. Only this file calls Pillow and simplejpeg, and clean.py to write images."""

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
"""Largest size of one image or frame, checked in its header before decoding. The largest base sees 17 million."""

# formats found in data sets; other readers of Pillow start programs (EPS) or are not safe for untrusted files
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # not MPO: a phone's photo followed by a preview is one picture
_ORIENTATION = 0x0112
# steps over rows and columns for each orientation; from 5 on, rows and columns are exchanged first
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}

Answer = TypeVar("Answer")

# Pillow's own limit of 89 million only warns; images above ours are refused with their name
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageRefused(ValueError):
    """An image that cannot be used as it is; the message names it and gives the reason."""


def ask_pillow(name: str, call: Callable[[], Answer]) -> Answer:
    """Return the result of one call to a decoder; any error becomes ImageRefused with the same message."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # decoders' errors have no common base class, and each release adds some
        # Pillow's own message contains a memory address, so it differs each time
        reason = "its bytes are of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageRefused(f"{name}: not a readable image ({type(error).__name__}: {reason})") from error


def probe_image(data: bytes, *, name: str = "image") -> ImageFacts:
    """Return the size of decode_image's result. Refuse the same images, except for broken pixel data."""
    image = open_image(data, name)
    # Pillow turns a TIFF by itself and reports the turned size
    if image.format != "TIFF" and orientation(image, name) in (5, 6, 7, 8):
        return ImageFacts(height=image.width, width=image.height)
    return ImageFacts(height=image.height, width=image.width)


def decode_image(data: bytes, *, name: str) -> torch.Tensor:
    """Return uint8 [H, W, 3]: upright by the EXIF orientation, transparency over white, 16 bits scaled to 8."""
    image = open_image(data, name)
    fast = _fast_jpeg(data, image, name)
    return torch.from_numpy(_to_rgb(upright(image, name), name) if fast is None else fast)


def open_image(data: bytes, name: str) -> Image.Image:
    """Read an image's header. Refuse unknown formats, several frames, too many pixels, and modes without a range."""
    image: Image.Image = ask_pillow(name, lambda: Image.open(io.BytesIO(data), formats=_FORMATS))
    if image.width * image.height > MAX_PIXELS:
        raise ImageRefused(
            f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded. Scale it down"
        )
    frames = ask_pillow(name, lambda: getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1
    if frames > 1:
        raise ImageRefused(f"{name}: a {image.format} with {frames} frames; keep one frame, or convert it to a video")
    if image.mode not in (*_EIGHT_BIT, *_SIXTEEN_BIT):
        raise ImageRefused(
            f"{name}: pixel format {image.mode} has no fixed range or no defined conversion to RGB; "
            f"convert it to 8 or 16 bits, grey or RGB (supported: {', '.join((*_EIGHT_BIT, *_SIXTEEN_BIT[:1]))})"
        )
    return image


def orientation(image: Image.Image, name: str) -> int:
    """Return the EXIF orientation, or 1 (upright) if there is none."""
    value: Any = ask_pillow(name, lambda: image.getexif().get(_ORIENTATION, 1))
    return value if isinstance(value, int) else 1


def upright(image: Image.Image, name: str) -> Image.Image:
    """Decode the image and turn it by its EXIF orientation."""
    turned: Image.Image = ask_pillow(name, lambda: ImageOps.exif_transpose(image))
    ask_pillow(name, turned.load)
    return turned


def _fast_jpeg(data: bytes, image: Image.Image, name: str) -> Pixels | None:
    """Return the same pixels as Pillow in half the time; None if Pillow must decode: CMYK, or damage it may survive."""
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
    if image.mode in _SIXTEEN_BIT:  # Pillow's own conversion clips at 255, which turns every bright pixel white
        wide = np.asarray(image).astype(np.uint32)
        return np.repeat(((wide * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        clear = ask_pillow(name, lambda: image.convert("RGBA"))
        image = Image.alpha_composite(white, clear)
    rgb = ask_pillow(name, lambda: image.convert("RGB"))
    return np.array(rgb)

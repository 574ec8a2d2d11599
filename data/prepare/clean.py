"""Prepares media for a shard: upright, without EXIF, GPS and other notes, pixels untouched. Loads Pillow."""

import io
import struct

from PIL import Image

from data.render.image import ask_pillow, decode_image, open_image, orientation, probe_image, upright

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_PNG_NOTES = (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"tIME")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")
_JPEG_NOTES = (0xE1, 0xED, 0xFE)  # EXIF and XMP, Photoshop, comments; colour profiles (0xE2) stay
_MP4_NOTES = (b"udta", b"meta")


def clean_image(data: bytes, *, name: str) -> tuple[bytes, str]:
    """Return bytes and extension, encoded again only where that is needed; ValueError if it cannot be decoded."""
    rgb = decode_image(data, name=name)  # refuses whatever training would refuse, pixels included
    image = open_image(data, name)
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    if orientation(image, name) in (0, 1) and kind in ("JPEG", "PNG", "WEBP"):
        bare = {"JPEG": _bare_jpeg, "PNG": _bare_png, "WEBP": _bare_webp}[kind](data)
        probe_image(bare, name=name)
        return bare, _EXTENSIONS[kind]
    turned = upright(image, name)
    for note in ("exif", "xmp", "comment"):
        turned.info.pop(note, None)
    out = io.BytesIO()
    if kind == "JPEG":
        profile = turned.info.get("icc_profile")
        ask_pillow(
            name,
            lambda: turned.save(out, "JPEG", quality=95, subsampling=0, icc_profile=profile, exif=b""),
        )
        return out.getvalue(), "jpg"
    if turned.mode not in _PNG_MODES:  # CMYK and YCbCr of a TIFF: PNG has neither
        turned = Image.fromarray(rgb.numpy())
    ask_pillow(name, lambda: turned.save(out, "PNG", exif=b""))
    return out.getvalue(), "png"


def _bare_jpeg(data: bytes) -> bytes:
    """Drop the segments that hold notes; the compressed pixels are copied."""
    out, at = bytearray(data[:2]), 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        length = 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] not in _JPEG_NOTES:
            out += data[at : at + length]
        at += length
    return bytes(out + data[at:])


def _bare_png(data: bytes) -> bytes:
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = 12 + struct.unpack(">I", data[at : at + 4])[0]
        kind = data[at + 4 : at + 8]
        if kind not in _PNG_NOTES:
            out += data[at : at + length]
        at += length
        if kind == b"IEND":
            break
    return bytes(out)


def _bare_webp(data: bytes) -> bytes:
    out, at = bytearray(), 12
    while at + 8 <= len(data):
        length = 8 + struct.unpack("<I", data[at + 4 : at + 8])[0]
        length += length % 2
        chunk = bytearray(data[at : at + length])
        if chunk[:4] == b"VP8X" and len(chunk) > 8:
            chunk[8] &= ~0b1100 & 0xFF  # the flags that announce EXIF and XMP
        if bytes(chunk[:4]) not in (b"EXIF", b"XMP "):
            out += chunk
        at += length
    return b"RIFF" + struct.pack("<I", 4 + len(out)) + b"WEBP" + bytes(out)


def clean_video(data: bytes) -> tuple[bytes, str]:
    """Return bytes and extension. In MP4 and MOV, boxes of notes become empty space, so that no offset moves."""
    if data[4:8] == b"ftyp":
        out = bytearray(data)
        _blank_notes(out)
        return bytes(out), "mov" if data[8:10] == b"qt" else "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return data, "webm" if b"webm" in data[:64] else "mkv"
    return data, "avi" if data[:4] == b"RIFF" else "video"


def _blank_notes(data: bytearray) -> None:
    """Blank every box of notes. A list of ranges replaces recursion, so that no nesting is too deep."""
    ranges = [(0, len(data))]
    while ranges:
        at, end = ranges.pop()
        if at + 8 > end:
            continue
        size, kind = struct.unpack(">I", data[at : at + 4])[0], bytes(data[at + 4 : at + 8])
        header = 8
        if size == 1 and at + 16 <= end:
            size, header = struct.unpack(">Q", data[at + 8 : at + 16])[0], 16
        elif size == 0:
            size = end - at
        if size < header or at + size > end:
            continue
        if kind in _MP4_NOTES:
            data[at + 4 : at + 8] = b"free"
            data[at + header : at + size] = bytes(size - header)
        elif kind in (b"moov", b"trak"):
            ranges.append((at + header, at + size))
        ranges.append((at + size, end))

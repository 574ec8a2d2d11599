"""Real image and video files, generated for tests, with any frame times and with a phone's rotation."""

import io
import struct
from fractions import Fraction

import av
import numpy as np

_TURNS = {90: (0, 1, 0, -1, 0, 0), 180: (-1, 0, 0, 0, -1, 0), 270: (0, -1, 0, 1, 0, 0)}


def picture(height, width, seed=0):
    """Return a photo-like array with smooth colour, edges and noise, the same on every machine."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([(x * 3 + y) % 256, (y * 5) % 256, (x * y // 7) % 256], axis=-1)
    return ((base + rng.integers(0, 40, base.shape)) % 256).astype(np.uint8)


def encode(image, kind="PNG", **options):
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def moving(frames, height=64, width=96):
    """Return frames of a sliding picture, all of them different."""
    still = picture(height, width)
    return [np.roll(still, 4 * number, axis=1) for number in range(frames)]


def clip(frames, *, rate=30, times=None, gop=12, kind="mp4", codec="libx264"):
    """Return the bytes of a video file; `times` gives frame times in seconds that do not follow `rate`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def turned(mp4, degrees):
    """Return the file with a display matrix in its track header, as phones write it: players rotate it clockwise."""
    data = bytearray(mp4)
    header = data.find(b"tkhd")
    assert data[header + 4] == 0, "version 0 of the box is expected"
    matrix = header + 4 + 24 + 16
    data[matrix : matrix + 24] = struct.pack(">6i", *(value << 16 for value in _TURNS[degrees]))
    return bytes(data)


def decode_all(data):
    """Decode every frame from the start, which is slow but always correct, without rotation."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

"""The text for a video and for a box: a time before each frame pair, and coordinates from 0 to 1000."""

import zlib
from collections.abc import Sequence
from typing import Literal

from data.format.facts import ImageFacts
from data.format.record import Record

Stamps = Literal["seconds", "hms", "mixed", "none"]
"""The forms of `data.video.timestamps`, and "none" for a probe that leaves the times out."""

_PAIR = "<|vision_start|><|video_pad|><|vision_end|>"


def video_text(stamps: Sequence[float], *, form: Stamps, nested: bool, video: str) -> str:
    """Return a time and a placeholder for each frame pair; the name of the video settles the form if it is mixed."""
    pairs = "".join(stamp_text(stamp, form, video) + _PAIR for stamp in stamps)
    return f"<|vision_start|>{pairs}<|vision_end|>" if nested else pairs


def stamp_text(stamp: float, form: Stamps, video: str) -> str:
    """Return the text before one frame pair."""
    if form == "none":
        return ""
    is_clock = form == "hms" or (form == "mixed" and zlib.crc32(video.encode()) % 2 == 1)
    return clock(stamp) if is_clock else seconds(stamp)


def seconds(stamp: float) -> str:
    """Return a time as `<3.0 seconds>`."""
    return f"<{stamp:.1f} seconds>"


def clock(stamp: float) -> str:
    """Return a time as `<00:00:03>`, rounded down."""
    minutes, whole = divmod(int(stamp), 60)
    return f"<{minutes // 60:02d}:{minutes % 60:02d}:{whole:02d}>"


def box_texts(record: Record, images: Sequence[ImageFacts]) -> list[str]:
    """Return the texts of a record's <bbox> and <point> marks in order: [x1, y1, x2, y2] relative to the image size."""
    objects = record.objects
    if objects is None:
        return []
    numbered = list(enumerate(objects.boxes))
    waiting = {
        "bbox": iter([item for item in numbered if len(item[1]) == 4]),
        "point": iter([item for item in numbered if len(item[1]) == 2]),
    }
    texts = []
    for content in (item for message in record.messages for item in message.contents if item.kind in waiting):
        number, box = next(waiting[content.kind])
        image = images[objects.image_id[number] if objects.image_id else 0]
        width, height = {
            "real": (image.width, image.height),
            "norm1": (1, 1),
            "norm1000": (1000, 1000),
        }[objects.bbox_type]
        if max(box[::2]) > width or max(box[1::2]) > height:
            raise ValueError(
                f"objects.bbox[{number}] is {list(box)}, outside its image of {image.width} x {image.height} pixels "
                f"(upright, as shown)"
            )
        relative = [round(1000 * value / (height if at % 2 else width)) for at, value in enumerate(box)]
        texts.append(f"[{', '.join(map(str, relative))}]")
    return texts

"""The images, videos and boxes of a record: their places, and how they are to be shown. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.format.fields import BadField, Fields, check_text, redact

BOX_TYPES = ("real", "norm1", "norm1000")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a medium's bytes: a member, or a path or url (with a byte range) that samples may share."""

    member: str | None = None
    path: str | None = None
    url: str | None = None
    range: tuple[int, int] | None = None  # offset, length

    def to_json(self) -> Any:
        """Return a plain member name where nothing else is set, else an object."""
        raw = _dense(self)
        return raw["member"] if list(raw) == ["member"] else raw


@dataclass(frozen=True, kw_only=True)
class ImageRef(Place):
    """An image of a record."""

    max_pixels: int | None = None


@dataclass(frozen=True, kw_only=True)
class VideoRef(Place):
    """A video of a record: a file, or a list of frames as images, with their times or rate."""

    frames: tuple[ImageRef, ...] = ()
    times: tuple[float, ...] = ()  # seconds of each frame of a frame list
    rate: float | None = None  # frames per second of a frame list
    fps: float | None = None  # frames to sample per second
    num_frames: int | None = None
    start: float | None = None  # seconds
    end: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None  # of one frame
    time_origin: Literal["clip", "video"] = "clip"


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Named things and their boxes. Box i belongs to image `image_id[i]`; all belong to image 0 if it is empty."""

    ref: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()  # x1, y1, x2, y2 of a box; x, y of a point
    bbox_type: Literal["real", "norm1", "norm1000"] = "real"
    image_id: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return boxes and points in one list, as ms-swift writes them."""
        out: dict[str, Any] = {"ref": list(self.ref), "bbox": [list(box) for box in self.boxes]}
        return {**out, "bbox_type": self.bbox_type, "image_id": list(self.image_id)}


def _dense(place: Place) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in vars(place).items():
        if value is None or value == () or (name, value) == ("time_origin", "clip"):
            continue
        out[name] = [frame.to_json() for frame in value] if name == "frames" else value
    return {name: list(value) if isinstance(value, tuple) else value for name, value in out.items()}


def _read_place(fields: Fields, *others: str) -> dict[str, Any]:
    named = {name: fields.text(name, None) for name in ("member", "path", "url")}
    given = [name for name, value in named.items() if value is not None] + list(others)
    if len(given) != 1:
        raise BadField(
            fields.where.rstrip("."),
            f"needs exactly one of member, path, url (videos: or frames), got {' and '.join(given) or 'none of them'}",
        )
    if named["member"] is not None and ("/" in named["member"] or named["member"] != named["member"].lower()):
        raise BadField(
            f"{fields.where}member", f"is {named['member']!r}; write what follows the key, lower-case: 0.jpg"
        )
    if named["url"] is not None and not named["url"].startswith(("http://", "https://")):
        raise BadField(f"{fields.where}url", f"is {redact(named['url'])!r:.80}; only http:// and https:// are read")
    span = fields.take("range", list, None)
    if span is not None:
        if named["member"] is not None or "frames" in others:
            raise BadField(f"{fields.where}range", "belongs to a path or url; a member is read whole")
        if len(span) != 2 or not all(type(n) is int and n >= 0 for n in span) or not 0 < span[1] < 2**48:
            raise BadField(f"{fields.where}range", f"is {span!r:.80}; write [offset, length] in bytes, length above 0")
        named["range"] = (span[0], span[1])
    return named


def read_image(item: Any, where: str) -> ImageRef:
    """Read an image: a member name, or an object."""
    if isinstance(item, str):
        item = {"member": item}
    fields = Fields(Fields.take_object(item, where), where)
    place = _read_place(fields)
    image = ImageRef(**place, max_pixels=fields.whole("max_pixels"))
    fields.done()
    return image


def read_video(item: Any, where: str) -> VideoRef:
    """Read a video: a member name, or an object with range, rate and limits."""
    if isinstance(item, str):
        item = {"member": item}
    fields = Fields(Fields.take_object(item, where), where)
    frames = tuple(read_image(frame, at) for frame, at in fields.items("frames"))
    place = _read_place(fields, *(["frames"] if frames else []))
    times = tuple(_seconds(time, at) for time, at in fields.items("times"))
    video = VideoRef(
        **place,
        frames=frames,
        times=times,
        rate=fields.number("rate", above=0),
        fps=fields.number("fps", above=0),
        num_frames=fields.whole("num_frames"),
        start=fields.number("start", least=0),
        end=fields.number("end", above=0),
        max_frames=fields.whole("max_frames"),
        max_pixels=fields.whole("max_pixels"),
        time_origin=fields.choice("time_origin", ("clip", "video"), "clip"),  # type: ignore[arg-type]  # checked
    )
    fields.done()
    _check_video(video, fields.where)
    return video


def _check_video(video: VideoRef, where: str) -> None:
    if video.fps is not None and video.num_frames is not None:
        raise BadField(f"{where}fps", "and num_frames exclude each other; keep one")
    if video.end is not None and video.end <= (video.start or 0):
        raise BadField(f"{where}end", f"is {video.end}, not after start {video.start or 0}")
    if not video.frames:
        if video.times or video.rate is not None:
            raise BadField(f"{where}times", "and rate describe a list of frames; a video file has its own times")
        return
    if (video.rate is None) == (not video.times):
        raise BadField(f"{where}frames", "needs either times (seconds of each frame) or rate (frames per second)")
    if video.times and len(video.times) != len(video.frames):
        raise BadField(f"{where}times", f"has {len(video.times)} entries for {len(video.frames)} frames")
    if any(b <= a for a, b in zip(video.times, video.times[1:], strict=False)):
        raise BadField(f"{where}times", "must rise from frame to frame")


def _seconds(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise BadField(where, f"is {value!r:.80}; write seconds from 0")
    return float(value)


def read_objects(fields: Fields) -> Objects:
    """Read ms-swift's objects: bbox holds boxes (4 numbers) and points (2); `point` is accepted as another name."""
    bbox = [_read_box(item, where, (2, 4)) for item, where in fields.items("bbox")]
    point = [_read_box(item, where, (2,)) for item, where in fields.items("point")]
    if bbox and point:
        raise BadField("objects.point", "and objects.bbox are both given; bbox may hold points too, as [x, y]")
    boxes = tuple(bbox or point)
    refs = []
    for item, where in fields.items("ref"):
        if not isinstance(item, str):
            raise BadField(where, f"is {item!r:.80}; write the name of the thing")
        refs.append(check_text(item, where))
    kind = fields.choice("bbox_type", BOX_TYPES, "real")
    image_id = [item for item, _ in fields.items("image_id")]
    if image_id and (len(image_id) != len(boxes) or not all(type(n) is int for n in image_id)):
        raise BadField("objects.image_id", f"is {image_id!r:.80}; write one image number for each box")
    fields.done()
    limit = {"real": 1e9, "norm1": 1.0, "norm1000": 1000.0}[kind]
    for index, box in enumerate(boxes):
        if not all(0 <= value <= limit for value in box):
            raise BadField(f"objects.bbox[{index}]", f"is {list(box)}; {kind} runs from 0 to {limit:g}")
        if len(box) == 4 and not (box[0] < box[2] and box[1] < box[3]):
            raise BadField(f"objects.bbox[{index}]", f"is {list(box)}; write x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    return Objects(ref=tuple(refs), boxes=boxes, bbox_type=kind, image_id=tuple(image_id))  # type: ignore[arg-type]


def _read_box(item: Any, where: str, lengths: Sequence[int]) -> tuple[float, ...]:
    numbers = isinstance(item, list) and all(type(value) in (int, float) for value in item)
    if not numbers or len(item) not in lengths:
        allowed = " or ".join({2: "[x, y]", 4: "[x1, y1, x2, y2]"}[length] for length in lengths)
        raise BadField(where, f"is {item!r:.80}; write {allowed}")
    return tuple(float(value) for value in item)


def media_members(images: Sequence[ImageRef], videos: Sequence[VideoRef]) -> list[str]:
    """Return the names of the members that images and videos use."""
    frames = [frame for video in videos for frame in video.frames]
    places: list[Place] = [*images, *videos, *frames]
    return [place.member for place in places if place.member is not None]

"""Cuts a conversation that is too long into parts that fit, between turns and never inside one. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from data.format.content import Content
from data.format.media import Objects
from data.format.record import Record

OfImage = TypeVar("OfImage")
OfVideo = TypeVar("OfVideo")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A part of a record, and which of the record's images and videos it has."""

    record: Record
    images: tuple[int, ...]
    videos: tuple[int, ...]

    def of(self, images: Sequence[OfImage], videos: Sequence[OfVideo]) -> tuple[list[OfImage], list[OfVideo]]:
        """Pick the part's items from lists with one item for each image and video of the whole record."""
        return [images[number] for number in self.images], [videos[number] for number in self.videos]


def cut_record(record: Record, first: int, last: int) -> Cut:
    """Return the messages first..last with the media and objects they mark; a first system message always stays."""
    turns = {*range(first, last + 1)} | ({0} if record.messages[0].role == "system" else set())
    taken: dict[str, list[int]] = {"image": [], "video": [], "ref": [], "box": []}
    seen = dict.fromkeys(taken, 0)
    for number, message in enumerate(record.messages):
        for content in message.contents:
            if content.kind != "text":
                kind = _counter(content)
                if number in turns:
                    taken[kind].append(seen[kind])
                seen[kind] += 1
    images = tuple(taken["image"])
    part = replace(
        record,
        messages=tuple(record.messages[number] for number in sorted(turns)),
        images=tuple(record.images[number] for number in images),
        videos=tuple(record.videos[number] for number in taken["video"]),
        objects=_cut_objects(record.objects, taken["ref"], taken["box"], images),
    )
    return Cut(record=part, images=images, videos=tuple(taken["video"]))


def _counter(content: Content) -> str:
    return "box" if content.kind in ("bbox", "point") else content.kind


def _cut_objects(
    objects: Objects | None, refs: Sequence[int], boxes: Sequence[int], images: tuple[int, ...]
) -> Objects | None:
    if objects is None or not (refs or boxes):
        return None
    owners = objects.image_id or (0,) * len(objects.boxes)
    missing = sorted({owners[number] for number in boxes} - set(images))
    if missing:
        raise ValueError(
            f"cannot be split: boxes of a later turn belong to image {missing[0]}, which an earlier one shows"
        )
    return replace(
        objects,
        ref=tuple(objects.ref[number] for number in refs),
        boxes=tuple(objects.boxes[number] for number in boxes),
        image_id=tuple(images.index(owners[number]) for number in boxes),
    )


def split_turns(record: Record, fits: Callable[[Cut], bool]) -> list[tuple[int, int]]:
    """Return the first and last message of each part, as long as they fit; ValueError if a single exchange does not.

    A part begins with a user's message, so questions keep their answers and tool calls their results. Parts without
    loss are left out.
    """
    roles = [message.role for message in record.messages]
    begin = 1 if roles[0] == "system" else 0
    starts = [begin] + [number for number in range(begin + 1, len(roles)) if roles[number] == "user"]
    ends = [start - 1 for start in starts[1:]] + [len(roles) - 1]
    parts: list[tuple[int, int]] = []
    first = 0
    while first < len(starts):
        last = first
        if not fits(cut_record(record, starts[first], ends[first])):
            raise ValueError(f"messages {starts[first]} to {ends[first]} alone do not fit a pack; turns are never cut")
        while last + 1 < len(starts) and fits(cut_record(record, starts[first], ends[last + 1])):
            last += 1
        parts.append((starts[first], ends[last]))
        first = last + 1
    return [part for part in parts if cut_record(record, *part).record.supervised]

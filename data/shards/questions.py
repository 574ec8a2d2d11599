"""Turns held-out samples into questions, each without the last answer of its conversation. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.format.facts import ImageFacts
from data.format.record import Record, RecordError
from data.format.turns import Cut, cut_record
from data.render.timestamps import box_texts
from data.shards.bytes import VideoBytes
from data.shards.reader import SampleReader


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sample whose last answer the model must give. Its media stay in the shard until they are read."""

    shard: Path
    number: int
    key: str
    source: str
    cut: Cut  # the sample without its answer
    references: tuple[str, ...]  # accepted answers

    @property
    def record(self) -> Record:
        """The conversation up to the answer."""
        return self.cut.record

    def media(self, reader: SampleReader) -> tuple[list[bytes], list[VideoBytes]]:
        """Return the bytes of the images and videos that the question shows, in order."""
        whole, members = reader.sample(self.shard, self.number)
        try:
            images, videos = reader.media(whole, members, self.shard.parent)
        except ValueError as error:
            raise RecordError(shard=self.shard.name, key=self.key, reason=str(error)) from error
        return self.cut.of(images, videos)

    @property
    def text(self) -> str:
        """The last turn before the answer, its media as marks."""
        contents = self.record.messages[-1].contents if self.record.messages else ()
        return "".join(item.text if item.kind == "text" else f"<{item.kind}>" for item in contents)


def read_questions(shards: Sequence[Path], reader: SampleReader, *, source: str) -> Iterator[Question]:
    """Yield the usable samples that end with an answer, in the shards' order; `source` is for those that name none."""
    for shard in shards:
        index = reader.index(shard)
        for number in range(len(index)):
            if number in index.problems:
                continue
            record = reader.record(shard, number)
            if len(record.messages) < 2 or record.messages[-1].role != "assistant":
                continue
            cut = cut_record(record, 0, len(record.messages) - 2)
            yield Question(
                shard=shard,
                number=number,
                key=index.keys[number],
                source=record.source or source,
                cut=replace(cut, record=replace(cut.record, answers=())),
                references=record.answers or (_last_answer(record, index.images(number)),),
            )


def _last_answer(record: Record, images: Sequence[ImageFacts]) -> str:
    """Return the text of the last turn, with boxes as a model writes them."""
    last = record.messages[-1]
    kinds = [item.kind for item in last.contents]
    boxes = box_texts(record, images)
    boxes = boxes[len(boxes) - kinds.count("bbox") - kinds.count("point") :]
    refs = list(record.objects.ref if record.objects else ())
    refs = refs[len(refs) - kinds.count("ref") :]
    written = []
    for item in last.contents:
        if item.kind in ("bbox", "point"):
            written.append(boxes.pop(0))
        elif item.kind == "ref":
            written.append(refs.pop(0))
        else:
            written.append(item.text if item.kind == "text" else f"<{item.kind}>")
    return "".join(written)

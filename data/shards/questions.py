"""Held-out samples as questions: the conversation up to its last answer, which a model is asked for. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.format.facts import ImageFacts
from data.format.record import Record, RecordError
from data.format.turns import cut_record
from data.render.timestamps import box_texts
from data.shards.bytes import VideoBytes
from data.shards.reader import SampleReader


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sample whose last answer is asked for. Its media stay in the shard until they are wanted."""

    shard: Path
    number: int
    key: str
    source: str
    record: Record  # without the answer
    references: tuple[str, ...]  # accepted answers
    images: tuple[int, ...]  # which of the whole sample's the record keeps
    videos: tuple[int, ...]

    def media(self, reader: SampleReader) -> tuple[list[bytes], list[VideoBytes]]:
        """Bytes of the images and videos that the question shows, in order."""
        whole, members = reader.sample(self.shard, self.number)
        try:
            images, videos = reader.media(whole, members, self.shard.parent)
        except ValueError as error:
            raise RecordError(shard=self.shard.name, key=self.key, reason=str(error)) from error
        return [images[at] for at in self.images], [videos[at] for at in self.videos]

    @property
    def text(self) -> str:
        """The last turn before the answer, its media as marks."""
        parts = self.record.messages[-1].parts if self.record.messages else ()
        return "".join(part.text if part.kind == "text" else f"<{part.kind}>" for part in parts)


def read_questions(shards: Sequence[Path], reader: SampleReader, *, source: str) -> Iterator[Question]:
    """The usable samples that end with an answer, in the shards' order; `source` names those that name none."""
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
                record=replace(cut.record, answers=()),
                references=record.answers or (_last_answer(record, index.images(number)),),
                images=cut.images,
                videos=cut.videos,
            )


def _last_answer(record: Record, images: Sequence[ImageFacts]) -> str:
    """What the last turn says, boxes written as a model writes them."""
    last = record.messages[-1]
    marks = [part.kind for message in record.messages for part in message.parts]
    boxes = box_texts(record, images)
    boxes = boxes[len(boxes) - sum(part.kind in ("bbox", "point") for part in last.parts) :]
    refs = list(record.objects.ref if record.objects else ())
    refs = refs[marks.count("ref") - sum(part.kind == "ref" for part in last.parts) :]
    written = []
    for part in last.parts:
        if part.kind in ("bbox", "point"):
            written.append(boxes.pop(0))
        elif part.kind == "ref":
            written.append(refs.pop(0))
        else:
            written.append(part.text if part.kind == "text" else f"<{part.kind}>")
    return "".join(written)

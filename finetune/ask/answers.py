"""Asks held-out questions and scores the answers: one JSON line per answer, one row per source. No torch but for JSONL.

A callable answers: a loaded model or an endpoint. A control replaces the media: `shuffled` shows each question those
of another, `blank` shows grey pictures. A model that uses its media scores badly under a control.
"""

import io
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.format.printable import count_of
from data.format.record import Record
from data.rows.files import RowSource, is_rows
from data.shards.bytes import Places, VideoBytes
from data.shards.find import find_shards
from data.shards.questions import Question, read_questions
from data.shards.reader import SampleReader
from finetune.ask.scores import Metric, find_metric, spoken

Control = Literal["kept", "shuffled", "blank"]


@dataclass(frozen=True, kw_only=True)
class ShownQuestion:
    """A question for a model: a record without its answer, and the bytes of its media."""

    key: str
    record: Record
    images: Sequence[bytes]
    videos: Sequence[VideoBytes]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. `finished` means that it ended by itself, not at the limit of tokens."""

    text: str
    finished: bool


Respond = Callable[[Iterator[ShownQuestion]], Iterator[Reply]]
"""Gives one reply to each question, in order."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One question with its answer and scores: a line in the file of answers."""

    question: Question
    reply: Reply
    scores: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the line as an object."""
        return {
            "source": self.question.source,
            "shard": str(self.question.shard),
            "key": self.question.key,
            "question": self.question.text,
            "references": list(self.question.references),
            "answer": self.reply.text,
            "finished": self.reply.finished,
            "scores": dict(self.scores),
        }


def find_questions(
    paths: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    jobs: int = 1,
    places: Places | None = None,
) -> tuple[list[Question], SampleReader]:
    """Read all questions of shards or rows (`PATH` or `NAME=PATH`), or draw a few of every source."""
    reader = SampleReader(cache_dir=cache_dir, places=places)
    questions: list[Question] = []
    for word in paths:
        name, sign, path = word.partition("=")
        if not sign:
            name, path = Path(word).stem, word
        if is_rows(path):
            from data.prepare.converted import shards_of_rows  # here, because its decoders take a second to load

            shards = shards_of_rows(RowSource(path=Path(path)), "DATA", cache_dir=cache_dir, jobs=jobs, places=places)
        else:
            shards = find_shards(path, "DATA", cache_dir=cache_dir)
        questions += read_questions(shards, reader, source=name)
    if not questions:
        raise ValueError(
            f"{', '.join(paths)}: no sample ends with an assistant's turn, so there is nothing to ask. "
            f"Look at one with `moetune shards show`"
        )
    return (questions if limit is None else _drawn(questions, limit, seed)), reader


def _drawn(questions: list[Question], limit: int, seed: int) -> list[Question]:
    """Draw at most `limit` questions of every source, and keep their order."""
    by_source = defaultdict(list)
    for question in questions:
        by_source[question.source].append(question)
    drawn: set[int] = set()
    for source, candidates in by_source.items():
        draw = random.Random(f"{seed}/{source}")
        places = draw.sample(range(len(candidates)), min(limit, len(candidates)))
        drawn |= {id(candidates[place]) for place in places}
    return [question for question in questions if id(question) in drawn]


def metrics_of(words: Sequence[str], sources: Sequence[str]) -> dict[str, dict[str, Metric]]:
    """Return the metrics of every source, from `METRIC` (all sources) and `SOURCE=METRIC`; `exact` by default."""
    of_all = [word for word in words if "=" not in word]
    of_source: dict[str, list[str]] = defaultdict(list)
    for word in words:
        source, sign, metric = word.partition("=")
        if sign and source not in sources:
            raise ValueError(f"--metric {word}: no sample has source {source!r}; the sources are {', '.join(sources)}")
        if sign:
            of_source[source].append(metric)
    named = {source: of_source.get(source) or of_all or ["exact"] for source in sources}
    return {source: {name: find_metric(name) for name in names} for source, names in named.items()}


def with_media(
    questions: Sequence[Question], reader: SampleReader, *, control: Control, seed: int
) -> Iterator[ShownQuestion]:
    """Yield the questions with their media, or with those that a control shows instead."""
    owners = _shuffled(questions, seed) if control == "shuffled" else range(len(questions))
    for question, owner in zip(questions, owners, strict=True):
        images, videos = questions[owner].media(reader)
        record = question.record
        if control == "shuffled":  # with the frames, times and rates, because they describe the media
            record = replace(record, images=questions[owner].record.images, videos=questions[owner].record.videos)
        elif control == "blank":
            if videos:
                raise ValueError(f"--media blank: {question.key} shows a video; blank pictures replace images only")
            images = [_grey(image) for image in images]
        yield ShownQuestion(key=question.key, record=record, images=images, videos=videos)


def _shuffled(questions: Sequence[Question], seed: int) -> list[int]:
    """Return the index of the question whose media each question gets: another one with as many images and videos.

    Each group is shuffled into one circle, so that no question keeps its own media.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for at, question in enumerate(questions):
        alike[(len(question.record.images), len(question.record.videos))].append(at)
    owners = list(range(len(questions)))
    for (images, videos), group in alike.items():
        if not images and not videos:
            continue
        if len(group) == 1:
            raise ValueError(
                f"--media shuffled: no other question shows {count_of(images, 'image')} and "
                f"{count_of(videos, 'video')}, as {questions[group[0]].key} does; use more samples"
            )
        circle = random.Random(seed).sample(group, len(group))
        for at, other in zip(circle, circle[1:] + circle[:1], strict=True):
            owners[at] = other
    return owners


def _grey(data: bytes) -> bytes:
    from PIL import Image

    from data.render.image import probe_image

    facts, png = probe_image(data), io.BytesIO()
    Image.new("RGB", (facts.width, facts.height), (128, 128, 128)).save(png, "PNG")
    return png.getvalue()


def unfit_questions(
    questions: Sequence[Question], metrics: Mapping[str, Mapping[str, Metric]]
) -> dict[tuple[Path, str], str]:
    """Find samples whose reference a metric of their source cannot read; return reasons by shard and key.

    Each reference is scored against itself, so this is known before the model is asked.
    """
    unfit = {}
    for question in questions:
        for metric in metrics[question.source].values():
            try:
                metric(question.references[0], question.references)
            except ValueError as error:
                unfit[question.shard, question.key] = str(error)
    return unfit


def require_fit(
    questions: Sequence[Question], metrics: Mapping[str, Mapping[str, Metric]], *, skip: bool
) -> tuple[list[Question], dict[tuple[Path, str], str]]:
    """Return the questions that all metrics can score, and the others with reasons.

    Raise ValueError if there are others, unless `skip` allows it and every source keeps some.
    """
    unfit = unfit_questions(questions, metrics)
    fit = [question for question in questions if (question.shard, question.key) not in unfit]
    lost = sorted({question.source for question in questions} - {question.source for question in fit})
    if unfit and (not skip or lost):
        (shard, key), reason = next(iter(unfit.items()))
        how_many = f"{len(unfit)} of {count_of(len(questions), 'sample')}"
        cure = f"No sample of {', '.join(lost)} is left. Give" if skip else "Skip them with --skip-unfit, or give"
        raise ValueError(
            f"{how_many} cannot be scored; the first is {shard}, sample {key}: {reason}. {cure} "
            f"the source another metric: --metric SOURCE=METRIC"
        )
    return fit, unfit


def ask_all(
    questions: Sequence[Question],
    shown: Iterator[ShownQuestion],
    respond: Respond,
    metrics: Mapping[str, Mapping[str, Metric]],
) -> Iterator[Scored]:
    """Yield every question with its reply and scores, as replies arrive."""
    for question, reply in zip(questions, respond(shown), strict=True):
        answer = spoken(reply.text)
        scores = {name: metric(answer, question.references) for name, metric in metrics[question.source].items()}
        yield Scored(question=question, reply=reply, scores=scores)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row for one source, or for all: samples, answers cut at the limit of tokens, and mean scores by metric."""

    source: str
    samples: int
    cut: int
    scores: Mapping[str, float]


def table(scored: Sequence[Scored]) -> list[Row]:
    """Return one row per source, and one for all; a mean in it covers the samples that the metric scored."""
    by_source: dict[str, list[Scored]] = defaultdict(list)
    for item in scored:
        by_source[item.question.source].append(item)
    rows = [_row(source, items) for source, items in sorted(by_source.items())]
    return rows if len(rows) == 1 else [*rows, _row("all", scored)]


def _row(source: str, items: Sequence[Scored]) -> Row:
    scores: dict[str, list[float]] = defaultdict(list)
    for item in items:
        for name, score in item.scores.items():
            scores[name].append(score)
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return Row(source=source, samples=len(items), cut=sum(not i.reply.finished for i in items), scores=means)


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the printed table."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    width = max(6, *(len(row.source) for row in rows))
    lines = [f"{'source':<{width}}  {'samples':>7}" + "".join(f"  {name:>{max(7, len(name))}}" for name in names)]
    for row in rows:
        cells = [f"{row.scores[name]:.4f}" if name in row.scores else "-" for name in names]
        columns = "".join(f"  {cell:>{max(7, len(name))}}" for cell, name in zip(cells, names, strict=True))
        lines.append(f"{row.source:<{width}}  {row.samples:>7}{columns}")
    return lines

"""Held-out questions, asked and scored: one JSON line an answer, one row a source. Torch is loaded for JSONL only.

A callable answers them: a loaded model or an endpoint. Controls change what is shown: with shuffled media each question
gets those of another, with blank media grey pictures; a model that looks does badly then.
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
from data.shards.bytes import Places, VideoBytes
from data.shards.questions import Question, read_questions
from data.shards.reader import SampleReader
from data.stream.corpus import find_shards
from finetune.ask.scores import Metric, find_metric, spoken

Control = Literal["kept", "shuffled", "blank"]


@dataclass(frozen=True, kw_only=True)
class ShownQuestion:
    """One question as it is shown: a record without its answer, and the bytes of its media."""

    key: str
    record: Record
    images: Sequence[bytes]
    videos: Sequence[VideoBytes]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. `finished`: it ended by itself, not at the limit of tokens."""

    text: str
    finished: bool


Respond = Callable[[Iterator[ShownQuestion]], Iterator[Reply]]
"""One reply for each question, in their order."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One question with its answer and scores, a line in the file of answers."""

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
    """Read all questions of shards, JSONL or JSON files (`PATH` or `NAME=PATH`), or draw a few of every source."""
    reader = SampleReader(cache_dir=cache_dir, places=places)
    questions: list[Question] = []
    for word in paths:
        name, sign, path = word.partition("=")
        if not sign:
            name, path = Path(word).stem, word
        if path.endswith((".jsonl", ".json")):
            from data.prepare.converted import shards_of_rows  # its decoders take a second to load

            shards = shards_of_rows(Path(path), "DATA", cache_dir=cache_dir, jobs=jobs, places=places)
        else:
            shards = find_shards(path, "DATA")
        questions += read_questions(shards, reader, source=name)
    if not questions:
        raise ValueError(
            f"{', '.join(paths)}: no sample there ends with an assistant's turn, so nothing is asked. "
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
    """Find every source's metrics, from `METRIC` (all sources) and `SOURCE=METRIC`; `exact` where none is named."""
    of_all = [word for word in words if "=" not in word]
    of_source: dict[str, list[str]] = defaultdict(list)
    for word in words:
        source, sign, metric = word.partition("=")
        if sign and source not in sources:
            raise ValueError(f"--metric {word}: no sample is of source {source!r}; there are {', '.join(sources)}")
        if sign:
            of_source[source].append(metric)
    named = {source: of_source.get(source) or of_all or ["exact"] for source in sources}
    return {source: {name: find_metric(name) for name in names} for source, names in named.items()}


def with_media(
    questions: Sequence[Question], reader: SampleReader, *, control: Control, seed: int
) -> Iterator[ShownQuestion]:
    """Yield the questions with their media, or with what a control shows instead."""
    owners = _shuffled(questions, seed) if control == "shuffled" else range(len(questions))
    for question, owner in zip(questions, owners, strict=True):
        images, videos = questions[owner].media(reader)
        record = question.record
        if control == "shuffled":  # frames, times and rates describe the media, so they come along
            record = replace(record, images=questions[owner].record.images, videos=questions[owner].record.videos)
        elif control == "blank":
            if videos:
                raise ValueError(f"--media blank: {question.key} shows a video; blank pictures replace images only")
            images = [_grey(image) for image in images]
        yield ShownQuestion(key=question.key, record=record, images=images, videos=videos)


def _shuffled(questions: Sequence[Question], seed: int) -> list[int]:
    """Return whose media each question gets: those of another with as many images and videos, by one drawn circle."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for at, question in enumerate(questions):
        alike[(len(question.record.images), len(question.record.videos))].append(at)
    owners = list(range(len(questions)))
    for (images, videos), group in alike.items():
        if not images and not videos:
            continue
        if len(group) == 1:
            raise ValueError(
                f"--media shuffled: no other question shows {images} images and {videos} videos as "
                f"{questions[group[0]].key} does; give more samples"
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
    """Find the samples, by shard and key, whose reference a metric of their source cannot read, and why.

    Each reference is measured against itself, so that this is known before a model is asked.
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
    """Return the questions that all metrics can score, and those that are left out; ValueError unless `skip`."""
    unfit = unfit_questions(questions, metrics)
    fit = [question for question in questions if (question.shard, question.key) not in unfit]
    lost = sorted({question.source for question in questions} - {question.source for question in fit})
    if unfit and (not skip or lost):
        (shard, key), reason = next(iter(unfit.items()))
        how_many = f"{len(unfit)} of {count_of(len(questions), 'sample')}"
        cure = f"No sample of {', '.join(lost)} is left. Give" if skip else "Leave them out with --skip-unfit, or give"
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
    """Yield every question with its reply and scores, as they come."""
    for question, reply in zip(questions, respond(shown), strict=True):
        answer = spoken(reply.text)
        scores = {name: metric(answer, question.references) for name, metric in metrics[question.source].items()}
        yield Scored(question=question, reply=reply, scores=scores)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One source, or all: the number of samples and of answers cut at the limit of tokens, mean scores by metric."""

    source: str
    samples: int
    cut: int
    scores: Mapping[str, float]


def table(scored: Sequence[Scored]) -> list[Row]:
    """Return a row a source, and one of all; there a metric's mean is taken over the samples that it measured."""
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

"""One question of a probe: synthetic media made from a seed, the right answer, and whether a model gives it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.format.record import Record, parse_record
from data.render.sample import Renderer, Sample
from data.rows.convert import convert_row
from finetune.ask.speaker import Sampling, Speaker

BATCH = 8
"""Prompts that are answered at once."""
LONGEST = 24
"""Tokens of the longest answer."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video as a list of PNG frames, with the seconds of each: no codec comes between the seed and the pixels."""

    frames: tuple[bytes, ...]
    times: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A question with the marks of its media, and the right answer. `name` becomes the record's id."""

    question: str
    answer: str
    name: str = "trial"
    images: tuple[bytes, ...] = ()
    clips: tuple[Clip, ...] = ()
    max_pixels: int | None = None
    """The most pixels of each image; None: the model's own limit."""

    def row(self, names: Iterable[str] = ()) -> dict[str, Any]:
        """Return the question as a row of a user's file; `names` are the media files, images first, in order."""
        given = iter(names)
        limit = {} if self.max_pixels is None else {"max_pixels": self.max_pixels}
        row: dict[str, Any] = {"id": self.name, "messages": [{"role": "user", "content": self.question}]}
        if self.images:
            row["images"] = [_place(next(given, f"{at}.png")) | limit for at in range(len(self.images))]
        if self.clips:
            row["videos"] = [
                {"frames": [_place(next(given, f"{at}.png")) for at in range(len(clip.frames))], "times": [*clip.times]}
                for clip in self.clips
            ]
        return row

    def record(self) -> Record:
        """Return the question as a record."""
        return parse_record(convert_row(self.row())[0], shard="probe", key="trial")

    def prompt(self, renderer: Renderer) -> Sample:
        """Render the question and the opening of the answer's turn."""
        videos = [clip.frames for clip in self.clips]
        return renderer.build(self.record(), self.images, videos, key=self.name, prompt=True)


def _place(name: str) -> dict[str, Any]:
    return {"path": name} if "/" in name else {"member": name}


def answers(speaker: Speaker, trials: Sequence[Trial]) -> Iterator[str]:
    """Yield the model's greedy answer to each trial."""
    for begin in range(0, len(trials), BATCH):
        some = trials[begin : begin + BATCH]
        prompts = [speaker.require_room(trial.prompt(speaker.renderer)) for trial in some]
        yield from (answer.text for answer in speaker.answer(prompts, Sampling(max_tokens=LONGEST)))


def is_right(answer: str, reference: str) -> bool:
    """Return whether an answer is the reference, ignoring case, white space around it and a full stop at its end."""
    return answer.strip().rstrip(".").casefold() == reference.casefold()

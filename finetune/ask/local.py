"""A loaded model as one who answers questions: side by side, those of like length together."""

from collections.abc import Iterator
from itertools import islice

from data.render.sample import Sample
from finetune.ask.answers import Asked, Reply, Respond
from finetune.ask.speaker import Sampling, Speaker

WINDOW = 4
"""Batches that are looked at together, so that prompts of like length stand side by side and little is padding."""


def prompt_of(speaker: Speaker, asked: Asked) -> Sample:
    """The question as the model gets it; an error in it names the sample."""
    try:
        prompt = speaker.renderer.build(asked.record, asked.images, asked.videos, key=asked.key, prompt=True)
        return speaker.require_room(prompt)
    except ValueError as error:
        raise ValueError(f"sample {asked.key}: {error}") from error


def local(speaker: Speaker, sampling: Sampling, *, batch: int) -> Respond:
    """Answer with a loaded model, `batch` prompts at a time; an answer does not depend on what stands beside it."""

    def respond(asked: Iterator[Asked]) -> Iterator[Reply]:
        first = 0
        while window := list(islice(asked, batch * WINDOW)):
            prompts = [prompt_of(speaker, one) for one in window]
            order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at].input_ids))
            replies: dict[int, Reply] = {}
            for begin in range(0, len(order), batch):
                places = order[begin : begin + batch]
                found = speaker.answer([prompts[at] for at in places], sampling, numbers=[first + at for at in places])
                replies |= {
                    at: Reply(text=answer.text, finished=answer.finished)
                    for at, answer in zip(places, found, strict=True)
                }
            yield from (replies[at] for at in range(len(window)))
            first += len(window)

    return respond

"""Answers questions with a local model, batching prompts of similar length."""

from collections.abc import Iterator
from itertools import islice

from data.render.sample import Sample
from finetune.ask.answers import Reply, Respond, ShownQuestion
from finetune.ask.speaker import Sampling, Speaker

WINDOW = 4
"""Batches that are formed together, so that prompts of similar length share one and padding is small."""


def prompt_of(speaker: Speaker, question: ShownQuestion) -> Sample:
    """Render the prompt of a question; errors name the sample."""
    try:
        prompt = speaker.renderer.build(
            question.record, question.images, question.videos, key=question.key, prompt=True
        )
        return speaker.require_room(prompt)
    except ValueError as error:
        raise ValueError(f"sample {question.key}: {error}") from error


def local(speaker: Speaker, sampling: Sampling, *, batch: int) -> Respond:
    """Return a callable that answers with a loaded model, `batch` prompts at a time.

    An answer does not depend on the rest of its batch.
    """

    def respond(questions: Iterator[ShownQuestion]) -> Iterator[Reply]:
        first = 0
        while window := list(islice(questions, batch * WINDOW)):
            prompts = [prompt_of(speaker, question) for question in window]
            order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at].input_ids))
            replies: dict[int, Reply] = {}
            for begin in range(0, len(order), batch):
                places = order[begin : begin + batch]
                numbers = [first + at for at in places]
                answers = speaker.answer([prompts[at] for at in places], sampling, numbers=numbers)
                replies |= {
                    at: Reply(text=answer.text, finished=answer.finished)
                    for at, answer in zip(places, answers, strict=True)
                }
            yield from (replies[at] for at in range(len(window)))
            first += len(window)

    return respond

"""Finds the parts of an adapter that a server leaves out: those without which we compute what it computed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.render.sample import Sample
from finetune.architecture.parts import VISION
from finetune.ask.speaker import Speaker


@dataclass(frozen=True, kw_only=True)
class Written:
    """A prompt, and what a server wrote: its tokens and their log-probabilities."""

    prompt: Sample
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def missing_parts(speaker: Speaker, written: Sequence[Written], tolerance: float) -> tuple[str, ...]:
    """Return the parts without which our log-probabilities are the server's; empty if no guess explains them."""
    for parts in _guesses(speaker.adapted):
        with speaker.without(parts):
            if all(_agrees(speaker, one, tolerance) for one in written):
                return parts
    return ()


def missing_line(parts: Sequence[str], adapted: Sequence[str]) -> str:
    """Return a sentence for people."""
    if set(parts) == set(adapted):
        return (
            "the server computes the base alone: it was started without the adapter, dropped it, or was asked for "
            "another model (--name)"
        )
    return f"the server leaves out the adapter's part {', '.join(parts)}: merge the adapter to serve all of it"


def _guesses(adapted: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield what servers leave out: everything, the vision side, all but one part, one part."""
    seen = set()
    groups = [tuple(adapted), tuple(part for part in adapted if part in VISION)]
    groups += [tuple(other for other in adapted if other != part) for part in adapted]
    groups += [(part,) for part in adapted]
    for group in groups:
        if group and group not in seen:
            seen.add(group)
            yield group


def _agrees(speaker: Speaker, written: Written, tolerance: float) -> bool:
    judged = speaker.judge(written.prompt, written.ids)
    return all(abs(log - ours.chosen) <= tolerance for log, ours in zip(written.logprobs, judged, strict=False))

"""Compares a live server with our own computation: token ids, image grids, greedy choices and log-probabilities.

The server writes an answer, and our model scores its tokens in one forward. So one differing token is one difference,
and a near tie, where rounding decides, can be distinguished from a wrong model. Values that a server does not return
are reported as such, not guessed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from data.format.printable import count_of
from data.render.sample import Sample
from finetune.ask.answers import ShownQuestion
from finetune.ask.endpoint import Completion, Endpoint, completion_body
from finetune.ask.local import prompt_of
from finetune.ask.missing_parts import Written, missing_line, missing_parts
from finetune.ask.speaker import Judged, Sampling, Speaker

DIAGNOSED = 3
"""Samples that an explanation of the differences must explain."""
TOPICS = ("token ids", "image grids", "greedy text", "log-probabilities")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One difference between the server and us."""

    key: str
    topic: str
    detail: str

    def __str__(self) -> str:
        return f"sample {self.key}, {self.topic}: {self.detail}"


@dataclass(kw_only=True)
class Card:
    """The comparisons so far, and the differences found."""

    tolerance: float
    max_tokens: int
    samples: int = 0
    compared: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOPICS, 0))
    untold: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOPICS, 0))
    near_ties: int = 0
    farthest: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    cause: str = ""
    """The parts of an adapter that the server leaves out, if that explains the differences."""
    note: str = ""
    """Settings for images and videos in the model's folder, if they differ from those of this comparison."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of the printed card, one per topic."""
        units = {"token ids": "prompts", "image grids": "grids", "greedy text": "tokens", "log-probabilities": "tokens"}
        for topic in TOPICS:
            wrong = sum(difference.topic == topic for difference in self.differences)
            status = "FAIL" if wrong else "pass" if self.compared[topic] else "none"
            notes = [f"{self.compared[topic]} {units[topic]} compared"]
            notes += [f"{wrong} differ"] if wrong else []
            notes += [f"not returned for {count_of(self.untold[topic], 'sample')}"] if self.untold[topic] else []
            if topic == "greedy text" and self.near_ties:
                notes.append(f"{self.near_ties} near ties within {self.tolerance:g}")
            if topic == "log-probabilities" and self.compared[topic]:
                notes.append(f"largest difference {self.farthest:.4f}, allowed {self.tolerance:g}")
            yield f"{status}  {topic:<18} {', '.join(notes)}"
        if self.cause:
            yield f"cause {self.cause}"
        if self.note:
            yield f"note  {self.note}"


def serve_check(
    speaker: Speaker,
    endpoint: Endpoint,
    questions: Iterator[ShownQuestion],
    *,
    tolerance: float,
    max_tokens: int,
    note: str = "",
) -> Iterator[Card]:
    """Compare sample by sample, and yield the card after each."""
    card, name = Card(tolerance=tolerance, max_tokens=max_tokens, note=note), endpoint.model_name()
    options = {
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 1,
        "return_token_ids": True,  # of vLLM, for the ids of prompt and answer; other servers ignore it
        "repeat_penalty": 1.0,  # of llama-cpp-python, which would use 1.1 and not take the likeliest token
    }
    wrong: list[Written] = []
    for question in questions:
        prompt = prompt_of(speaker, question)
        completion = endpoint.complete(completion_body(question, name, options))
        card.samples += 1
        if _compare_prompt(card, question.key, prompt, completion, speaker):
            before = len(card.differences)
            _compare_answer(card, question.key, prompt, completion, speaker)
            if len(card.differences) > before and completion.ids and completion.logprobs:
                wrong.append(Written(prompt=prompt, ids=completion.ids, logprobs=completion.logprobs))
        yield card
    if wrong and speaker.adapted and (parts := missing_parts(speaker, wrong[:DIAGNOSED], tolerance)):
        card.cause = missing_line(parts, speaker.adapted)
        yield card


def _compare_prompt(card: Card, key: str, prompt: Sample, completion: Completion, speaker: Speaker) -> bool:
    """Return whether the server read the same prompt; otherwise answers cannot be compared."""
    ours: list[int] = prompt.input_ids.tolist()
    theirs = completion.prompt_ids
    if not theirs:
        return _compare_length(card, key, prompt, completion.prompt_tokens)
    pads = speaker.renderer.media_ids
    (our_text, our_runs), (their_text, their_runs) = _without_runs(ours, pads), _without_runs(theirs, pads)
    before = len(card.differences)
    card.compared["token ids"] += 1
    if our_text != their_text:
        at = next((n for n, (a, b) in enumerate(zip(our_text, their_text, strict=False)) if a != b), len(our_text))
        at = min(at, len(our_text), len(their_text))
        there, here = _spelled(their_text, at, speaker), _spelled(our_text, at, speaker)
        detail = f"token {at} (media as one) is {there} there, {here} here"
        card.differences.append(Difference(key=key, topic="token ids", detail=detail))
    elif their_runs and all(run == 1 for run in their_runs) and their_runs != our_runs:
        card.untold["image grids"] += 1  # the server returned one placeholder per medium
    else:
        card.compared["image grids"] += len(our_runs)
        for number, (mine, other) in enumerate(zip(our_runs, their_runs, strict=True)):
            if mine != other:
                detail = f"image or frame pair {number + 1} takes {other} tokens there, {mine} here"
                detail += _grids(prompt, card)
                card.differences.append(Difference(key=key, topic="image grids", detail=detail))
    return len(card.differences) == before


def _compare_length(card: Card, key: str, prompt: Sample, theirs: int | None) -> bool:
    """Compare the length of the prompt, media included: a server without ids returns nothing else."""
    card.untold["token ids"] += 1
    card.untold["image grids"] += 1
    ours = len(prompt.input_ids)
    if theirs in (None, ours):
        return True
    detail = f"the prompt takes {theirs} tokens there, {ours} here{_grids(prompt, card)}"
    card.differences.append(Difference(key=key, topic="token ids", detail=detail))
    return False


def _compare_answer(card: Card, key: str, prompt: Sample, completion: Completion, speaker: Speaker) -> None:
    logprobs = completion.logprobs
    ids = _answer_ids(completion, speaker)
    if ids is None:
        card.untold["log-probabilities"] += 1
        _compare_text(card, key, prompt, completion.text, speaker)
        return
    judged = speaker.judge(prompt, ids)
    _compare_choices(card, key, ids, judged, speaker)
    if not logprobs:
        card.untold["log-probabilities"] += 1
        return
    worst = (0.0, 0)
    for at, (theirs, mine) in enumerate(zip(logprobs, judged, strict=False)):
        card.compared["log-probabilities"] += 1
        worst = max(worst, (abs(theirs - mine.chosen), at))
    card.farthest = max(card.farthest, worst[0])
    if worst[0] > card.tolerance:
        there, here = logprobs[worst[1]], judged[worst[1]].chosen
        detail = f"of token {worst[1] + 1}, {_spelled(ids, worst[1], speaker)}: {there:.4f} there, {here:.4f} here"
        card.differences.append(Difference(key=key, topic="log-probabilities", detail=detail))


def _answer_ids(completion: Completion, speaker: Speaker) -> list[int] | None:
    """Return the tokens that the server wrote: its own list, or those of the text if their number fits."""
    if completion.ids:
        return list(completion.ids)
    text, count = completion.text, len(completion.logprobs)
    ids = speaker.renderer.encode(text)
    is_complete = "\ufffd" not in text and speaker.renderer.decode(ids) == text
    return ids if ids and count and len(ids) in (count, count - 1) and is_complete else None


def _compare_text(card: Card, key: str, prompt: Sample, text: str, speaker: Speaker) -> None:
    """Compare only greedy text, because tokens are not known. A near tie then counts as a difference."""
    (ours,) = speaker.answer([prompt], Sampling(max_tokens=card.max_tokens))
    card.compared["greedy text"] += len(ours.ids)
    if ours.text != text:
        at = next((n for n, (a, b) in enumerate(zip(ours.text, text, strict=False)) if a != b), None)
        at = min(len(ours.text), len(text)) if at is None else at
        detail = f"from character {at + 1} on it is {text[at : at + 40]!r} there, {ours.text[at : at + 40]!r} here"
        card.differences.append(Difference(key=key, topic="greedy text", detail=detail))


def _compare_choices(card: Card, key: str, ids: Sequence[int], judged: Sequence[Judged], speaker: Speaker) -> None:
    """Compare each token that the server wrote with our own best one in its place."""
    for at, (token, mine) in enumerate(zip(ids, judged, strict=True)):
        card.compared["greedy text"] += 1
        if token == mine.best_id:
            continue
        if mine.best - mine.chosen <= card.tolerance:
            card.near_ties += 1
            continue
        detail = (
            f"token {at + 1} is {_spelled(ids, at, speaker)} there, {_spelled([mine.best_id], 0, speaker)} here, whose "
            f"log-probability is higher by {mine.best - mine.chosen:.4f}"
        )
        card.differences.append(Difference(key=key, topic="greedy text", detail=detail))
        return


def _without_runs(ids: Sequence[int], pads: frozenset[int]) -> tuple[list[int], list[int]]:
    """Return the tokens with each run of one placeholder as a single one, and the lengths of the runs."""
    runs = [(token, sum(1 for _ in group)) for token, group in groupby(ids)]
    text = [token for token, count in runs for _ in range(1 if token in pads else count)]
    return text, [count for token, count in runs if token in pads]


def _grids(prompt: Sample, card: Card) -> str:
    """Describe our grids of a prompt's images and videos, and where to look if the server's differ."""
    grids = [*prompt.image_grids.tolist(), *prompt.video_grids.tolist()]
    if not grids:
        return ""
    sizes = ", ".join("x".join(map(str, grid)) for grid in grids)
    look = card.note or "compare the sizes in preprocessor_config.json with the server's options"
    return f" (grids here: {sizes}; {look})"


def _spelled(ids: Sequence[int], at: int, speaker: Speaker) -> str:
    return f"{ids[at]} ({speaker.renderer.spell(ids[at])!r})" if at < len(ids) else "the end"

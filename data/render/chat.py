"""Renders conversations as text with the base's own chat template, and gives every character its loss weight.

Turns end where the template itself ended them; marked text makes that certain (template.py). Token ids are never
searched.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.config import ChatConfig
from data.format.content import Content
from data.format.record import Message, Record
from data.render.template import (
    MEDIA,
    MEDIA_END,
    PLAIN,
    PLAIN_END,
    Span,
    Template,
    blank,
    mark,
    mark_deep,
    render,
    unmark,
)

_TURN = re.compile(r"<\|im_start\|>([^\n<]*)\n(.*?)(<\|im_end\|>)\n?", re.DOTALL)
_THOUGHT = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
_THINK_TAGS = re.compile(r"</?think>")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Text for the tokenizer, with one placeholder for each medium."""

    text: str
    weights: np.ndarray[Any, np.dtype[np.float32]]  # of each character
    plain: tuple[Span, ...]  # spans that spell a control token but are only text


def render_record(
    record: Record,
    media: Sequence[str],
    boxes: Sequence[str],
    *,
    template: Template,
    config: ChatConfig,
    prompt: bool = False,
) -> Rendered:
    """Render an entire conversation; `media` and `boxes` are the texts of its media and boxes, in order of their marks.

    With `prompt` the text ends with the opening of the assistant's next turn, as a server's does, and has no loss.
    """
    contents = _Contents(record, iter(media), iter(boxes), template)
    turns = [contents.of(message) for message in record.messages]
    last_question = max((at for at, message in enumerate(record.messages) if message.role == "user"), default=-1)
    messages = []
    for at, (message, (content, thinking)) in enumerate(zip(record.messages, turns, strict=True)):
        thinking = "" if config.thinking == "drop" else thinking.strip("\n")
        messages.append(_turn(message, content, thinking, template, is_history=at < last_question))
    marked = render(template, messages, record.tools, prompt=prompt)
    text, plain, shown = unmark(marked)
    if len(shown) != len(media):
        raise ValueError(f"the base's chat template shows {len(shown)} of the {len(media)} images and videos")
    weights = np.zeros(len(text), dtype=np.float32)
    if not prompt:
        _weigh(weights, blank(text, plain), record.messages, template=template, config=config)
    for start, end in shown:
        weights[start:end] = 0
    return Rendered(text=text, weights=weights, plain=tuple(plain))


class _Contents:
    """Walks the messages and gives each mark the next medium, reference or box."""

    def __init__(self, record: Record, media: Iterator[str], boxes: Iterator[str], template: Template) -> None:
        self._media, self._boxes = media, boxes
        self._refs = iter(record.objects.ref if record.objects else ())
        self._template = template

    def of(self, message: Message) -> tuple[str, str]:
        """Return (content, thinking) of a message, as marked text."""
        spelled = self._template.specials if message.role == "assistant" else self._template.controls
        content = "".join(self._text_of(item, spelled) for item in message.contents)
        if message.role != "assistant":
            return content, ""
        thinking, content = _split_thinking(content, is_thinking_base=self._template.thinks)
        if message.thinking is not None:
            if thinking:
                raise ValueError("an assistant message has `thinking` and a <think> block in its content; keep one")
            thinking = mark(message.thinking, spelled)
        return _mark_again(content), _mark_again(thinking)

    def _text_of(self, content: Content, spelled: re.Pattern[str]) -> str:
        if content.kind == "text":
            return mark(content.text, spelled)
        if content.kind == "ref":
            return mark(next(self._refs), spelled)
        if content.kind in ("bbox", "point"):
            return next(self._boxes)
        return f"{MEDIA}{next(self._media)}{MEDIA_END}"


def _mark_again(text: str) -> str:
    """Mark the think tags that remain once the thinking is removed: they are only talk about tags."""
    return _THINK_TAGS.sub(f"{PLAIN}\\g<0>{PLAIN_END}", text)


def _split_thinking(content: str, *, is_thinking_base: bool) -> tuple[str, str]:
    """Return (thinking, answer). A thinking model's own output lacks the opening tag, which is in its prompt."""
    begins = content.lstrip().startswith("<think>")
    if "</think>" not in content:
        if begins:
            raise ValueError("an assistant message opens <think> and never closes it")
        return "", content
    if not begins and not is_thinking_base:
        return "", content
    thinking, _, answer = content.partition("</think>")
    return thinking.lstrip().removeprefix("<think>") if begins else thinking, answer.lstrip("\n")


def _turn(message: Message, content: str, thinking: str, template: Template, *, is_history: bool) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if message.role != "assistant":
        return turn
    if template.thinks:  # the template itself removes thinking from the history
        turn["reasoning_content"] = thinking
    elif thinking.strip() and not is_history:
        turn["content"] = f"<think>\n{thinking}\n</think>\n\n{content}"
    if message.tool_calls:
        spelled = template.controls
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": mark(call.name, spelled), "arguments": mark_deep(call.arguments, spelled)},
            }
            for call in message.tool_calls
        ]
    return turn


def _weigh(
    weights: np.ndarray[Any, np.dtype[np.float32]],
    text: str,
    messages: Sequence[Message],
    *,
    template: Template,
    config: ChatConfig,
) -> None:
    """Put each turn's weight on its body and its end mark, never on its header."""
    for turn, group in _pair(text, messages):
        message, (start, end) = group[0], (turn.start(2), turn.end(3))
        if message.role == "tool":
            responses = list(_RESPONSE.finditer(text, *turn.span(2)))
            if len(responses) != len(group):
                raise ValueError(f"the base's chat template shows {len(responses)} of {len(group)} tool messages")
            for response, of_tool in zip(responses, group, strict=True):
                weights[slice(*response.span(1))] = of_tool.weight
            continue
        if message.role != "assistant":
            weights[start:end] = message.weight
            continue
        thought = _THOUGHT.match(text, start, turn.end(2))
        if template.thinks and thought is None and message.loss is None:
            continue  # history without its thinking: on a server the model never begins a turn like this
        begin = start + len(template.opening) if text.startswith(template.opening, start) else start
        weights[begin:end] = message.weight
        if thought and (config.thinking == "mask" or not thought[1].strip()):
            weights[start : thought.end()] = 0


def _pair(text: str, messages: Sequence[Message]) -> Iterator[tuple[re.Match[str], list[Message]]]:
    """Pair rendered turns with their messages. Tool messages in a row share one; a template may add a system turn."""
    groups: list[list[Message]] = []
    for message in messages:
        if message.role == "tool" and groups and groups[-1][0].role == "tool":
            groups[-1].append(message)
        else:
            groups.append([message])
    turns = list(_TURN.finditer(text))
    if "".join(turn[0] for turn in turns) != text:
        raise ValueError("the base's chat template writes text outside <|im_start|> ... <|im_end|> turns")
    if turns and turns[0][1] == "system" and groups[0][0].role != "system":
        turns = turns[1:]
    rendered = [turn[1] for turn in turns]
    written = ["user" if group[0].role == "tool" else group[0].role for group in groups]
    if rendered != written:
        raise ValueError(
            f"the base's chat template leaves out turns: it renders {rendered} of a conversation with {written}"
        )
    return zip(turns, groups, strict=True)

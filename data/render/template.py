"""The base's own chat template, and marks that keep a message's text apart from the template's own.

Control tokens spelled in a message, and the media that we insert, are enclosed in characters that no text may contain.
So every other `<|im_start|>` and `<|im_end|>` after rendering was written by the template.
"""

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from data.config import ChatConfig
from data.render.base_file import read_object

Span = tuple[int, int]

# Unicode noncharacters: reserved for internal use, never part of text
PLAIN, PLAIN_END = "\ufdd0", "\ufdd1"
MEDIA, MEDIA_END = "\ufdd2", "\ufdd3"
_MARKERS = re.compile("[\ufdd0-\ufdd3]")
SECONDS = 60.0
"""CPU time in which a conversation must be rendered: it takes less than one where the template is sound."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The base's template, with the patterns needed to use it safely."""

    source: str
    tokenizer: Any
    controls: re.Pattern[str]  # tokens that only the template may write
    specials: re.Pattern[str]  # tokens that an assistant may not write either; it may write the other control tokens
    thinks: bool  # the template supports thinking, and removes it from the history
    opening: str  # text that a server adds after the assistant's header, so that the model does not generate it


def read_template(folder: Path, tokenizer: Any, config: ChatConfig) -> Template:
    """Read the template that a server of this base uses; the processor's file takes precedence over the tokenizer's."""
    source = _template_source(folder, tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    specials = [token.content for token in added if token.special]
    written = [token.content for token in added if token.content in source and not token.content.isspace()]
    unknown = [token for token in config.keep_control_tokens if token not in specials]
    if unknown:
        raise ValueError(
            f"data.chat.keep_control_tokens names {unknown}, which are not special tokens of the base's tokenizer; "
            f"its special tokens: {', '.join(specials)}"
        )
    template = Template(
        source=source,
        tokenizer=tokenizer,
        controls=_any_of({*specials, *written}),
        specials=_any_of(set(specials) - set(config.keep_control_tokens)),
        thinks="</think>" in source,
        opening="",
    )
    question = [{"role": "user", "content": "?"}]
    closed, prompt = render(template, question, ()), render(template, question, (), prompt=True)
    header = "<|im_start|>assistant\n"
    if not prompt.startswith(closed + header):
        raise ValueError(
            f"{folder}: the base's chat template opens the assistant's turn not with {header!r} but with "
            f"{prompt[len(closed) :]!r}; moetune reads templates of the Qwen family"
        )
    return replace(template, opening=prompt[len(closed + header) :])


def _template_source(folder: Path, tokenizer: Any) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return str(read_object(folder / "chat_template.json").text("chat_template"))
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder}: there is no chat template in chat_template.jinja, chat_template.json or "
            f"tokenizer_config.json. Copy it from the release the weights came from"
        )
    return str(tokenizer.chat_template)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Return a pattern of these tokens, the longest first, so that a token is preferred to those inside it."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)")


def mark(text: str, spelled: re.Pattern[str]) -> str:
    """Enclose each of these tokens in markers that declare it plain text."""
    if marker := _MARKERS.search(text):
        raise ValueError(f"the text contains U+{ord(marker[0]):04X}, which is not a character of any script; remove it")
    return spelled.sub(f"{PLAIN}\\g<0>{PLAIN_END}", text)


def mark_deep(value: Any, spelled: re.Pattern[str]) -> Any:
    """Mark every string in a JSON value, names included."""
    if isinstance(value, str):
        return mark(value, spelled)
    if isinstance(value, dict):
        return {mark(name, spelled): mark_deep(item, spelled) for name, item in value.items()}
    return [mark_deep(item, spelled) for item in value] if isinstance(value, list) else value


def render(
    template: Template, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], *, prompt: bool = False
) -> str:
    """Render a conversation with the template; tools are marked here, messages by the caller."""
    marked = [mark_deep(tool, template.controls) for tool in tools]
    try:
        with _cpu_limit(SECONDS):
            rendered: str = template.tokenizer.apply_chat_template(
                messages,
                tools=marked or None,
                chat_template=template.source,
                add_generation_prompt=prompt,
                tokenize=False,
            )
    except Exception as error:  # noqa: BLE001  # a template is a program of the base and may raise anything
        words = f"{error} ({type(error).__name__})"
        raise ValueError(f"the base's chat template refuses the conversation: {words}") from error
    return rendered


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once the process has computed this long; only a main thread can be limited."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it is not done after {seconds:g} s; a loop that never ends?")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def unmark(marked: str) -> tuple[str, list[Span], list[Span]]:
    """Return the text without markers, the spans of plain text and the spans of media."""
    pieces: list[str] = []
    spans: dict[str, list[Span]] = {PLAIN: [], MEDIA: []}
    opened: list[tuple[str, int]] = []
    length = at = 0
    for marker in _MARKERS.finditer(marked):
        pieces.append(marked[at : marker.start()])
        length, at = length + marker.start() - at, marker.end()
        if marker[0] in spans:
            opened.append((marker[0], length))
            continue
        kind, start = opened.pop() if opened else ("", 0)
        if (kind, marker[0]) not in ((PLAIN, PLAIN_END), (MEDIA, MEDIA_END)):
            raise ValueError("the base's chat template cuts through a message; its turns cannot be told apart")
        spans[kind].append((start, length))
    pieces.append(marked[at:])
    if opened:
        raise ValueError("the base's chat template cuts through a message; its turns cannot be told apart")
    return "".join(pieces), spans[PLAIN], spans[MEDIA]


def blank(text: str, plain: Sequence[Span]) -> str:
    """Blank out the plain spans, so that every control token left is a real one."""
    for start, end in plain:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text

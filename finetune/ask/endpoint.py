"""Asks questions over HTTP of any server with OpenAI's chat completions: vLLM, sglang, or a hosted one. No torch.

Media are sent as data URLs, unchanged from the shard; the server resizes them. A request that a busy or restarting
server refuses is repeated; an error in the request or the key is raised at once.
"""

import base64
import http.client
import json
import math
import os
import random
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Event, Semaphore
from typing import Any

from data.format.printable import count_of
from data.format.record import Message, Record
from data.shards.bytes import VideoBytes
from finetune.ask.answers import Reply, Respond, ShownQuestion
from finetune.ask.exchange import Answer, EndpointError, Result, exchange, in_thread, text_of, understood

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP codes after which a request is repeated."""
_LONGEST_WAIT_S = 60.0
_FIRST_ERROR = 300
"""HTTP codes below this one mean success; redirects have been followed."""
_REASON_BYTES = 4096
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


@dataclass(frozen=True, kw_only=True)
class Completion(Reply):
    """An answer with its tokens and log-probabilities; those that the server does not return are empty or None."""

    prompt_ids: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server and the settings for requests. `url` may end with or without /v1."""

    url: str
    model: str = ""
    """The model's name on the server; empty: the only one that it serves."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key; if it is not set, no key is sent."""
    timeout: float = 600.0
    attempts: int = 5
    concurrency: int = 8
    wait: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url is {self.url!r}; write http://host:port/v1, as the server prints at its start")
        if not self.timeout > 0:
            raise ValueError(f"--timeout must be a number of seconds above 0, got {self.timeout:g}")

    @property
    def root(self) -> str:
        """Return the address before /v1."""
        return self.url.rstrip("/").removesuffix("/v1")

    def call(self, path: str, body: Mapping[str, Any] | None = None, *, parse: Callable[[Any], Result]) -> Result:
        """POST a body, or GET without one, and parse the JSON answer; raise EndpointError if there is none."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        address = self.root + path
        request = urllib.request.Request(address, data=data, headers=headers)  # scheme checked above
        problem, pause = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                self.wait(min(pause or 2.0**attempt * random.uniform(0.5, 1), _LONGEST_WAIT_S))
            try:
                answer = exchange(request, timeout=self.timeout)
            except (OSError, http.client.HTTPException) as error:
                problem, pause = f"{getattr(error, 'reason', None) or error}", 0.0
                continue
            if answer.status < _FIRST_ERROR:
                return understood(answer.body, parse, address=address)
            problem, pause = self._temporary(answer, path), answer.retry_after
        raise EndpointError(
            f"{address}: no answer after {count_of(self.attempts, 'attempt')}; the last failed with: {problem}"
        )

    def _temporary(self, answer: Answer, path: str) -> str:
        """Describe an error after which the request is repeated; raise EndpointError for any other."""
        reason = _reason(answer)
        if answer.status in AGAIN:
            return f"HTTP {answer.status}: {reason}"
        advice = ""
        if answer.status in (401, 403):
            is_set = "is set but refused" if os.environ.get(self.key_variable) else "is not set"
            advice = f". The key is read from the environment variable {self.key_variable}, which {is_set}"
        if answer.status == 404:
            advice = f". --url must be the server's address up to /v1, and --name a model that it has ({self.url})"
        raise EndpointError(f"{self.root}{path}: HTTP {answer.status}: {reason}{advice}")

    def complete(self, body: Mapping[str, Any]) -> Completion:
        """Ask for a chat completion."""
        return self.call("/v1/chat/completions", body, parse=completion_of)

    def model_name(self) -> str:
        """Return the model's name as given, or the only one that the server lists."""
        if self.model:
            return self.model
        names = self.call("/v1/models", parse=lambda tree: [text_of(entry["id"]) for entry in tree["data"]])
        if len(names) != 1:
            raise ValueError(f"{self.root} serves {', '.join(names) or 'no model'}; choose one with --name")
        return names[0]


def _in_threads(
    work: Callable[[ShownQuestion], Reply], most: int
) -> tuple[Callable[[ShownQuestion], Future[Reply]], Event]:
    """Return a function that runs `work` in threads, at most `most` at a time, and an event that stops new ones."""
    turns, stop = Semaphore(most), Event()

    def in_turn(question: ShownQuestion) -> Reply:
        with turns:
            if stop.is_set():
                raise EndpointError("the question was cancelled")
            return work(question)

    return lambda question: in_thread(partial(in_turn, question)), stop


def remote(endpoint: Endpoint, options: Mapping[str, Any]) -> Respond:
    """Return a callable that asks a server several questions at a time; `options` are OpenAI's, such as max_tokens."""

    def respond(questions: Iterator[ShownQuestion]) -> Iterator[Reply]:
        name = endpoint.model_name()

        def ask(question: ShownQuestion) -> Reply:
            try:
                return endpoint.complete(completion_body(question, name, options))
            except EndpointError as error:
                raise EndpointError(f"sample {question.key}: {error}") from error

        waiting: deque[Future[Reply]] = deque()
        start, stop = _in_threads(ask, endpoint.concurrency)
        try:
            for question in questions:
                waiting.append(start(question))
                if len(waiting) >= 2 * endpoint.concurrency:  # bounds the media held in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stop.set()

    return respond


def completion_body(question: ShownQuestion, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request's body: the conversation in OpenAI's form."""
    images, videos = iter(question.images), iter(question.videos)
    messages = [_message(message, images, videos) for message in question.record.messages]
    calls = 0
    for message in messages:  # OpenAI matches results to calls by id, our records by order
        calls = calls + 1 if message["role"] == "tool" else 0
        if calls:
            message["tool_call_id"] = f"call-{calls - 1}"
    body: dict[str, Any] = {"model": model, "messages": messages, **options}
    if question.record.tools:
        body["tools"] = list(question.record.tools)
    return body


def completion_of(tree: Any) -> Completion:
    """Return the first choice of a completion; an invalid tree may raise any exception."""
    choice = tree["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    usage = tree.get("usage") or {}
    return Completion(
        text=text_of(choice["message"]["content"]),
        finished=choice["finish_reason"] != "length",
        prompt_ids=_ids(tree.get("prompt_token_ids") or choice.get("prompt_token_ids")),
        prompt_tokens=None if usage.get("prompt_tokens") is None else int(usage["prompt_tokens"]),
        ids=_ids(choice.get("token_ids")),
        logprobs=tuple(_finite(entry["logprob"]) for entry in entries),
    )


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"a log-probability must be finite, got {number}")
    return number


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(map(int, values or ()))


def check_sendable(record: Record) -> None:
    """Raise ValueError if OpenAI's protocol cannot express the record."""
    for message in record.messages:
        for part in message.contents:
            if part.kind not in ("text", "image", "video"):
                raise ValueError(f"a question contains <{part.kind}>; a server takes only text, images and videos")
    for video in record.videos:
        if video.frames or video.start is not None or video.end is not None:
            raise ValueError(
                "a question shows a range or a list of frames of a video, but a server takes only complete files. Cut "
                "the file, or ask a local model with --model"
            )


def _message(message: Message, images: Iterator[bytes], videos: Iterator[VideoBytes]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in message.contents:
        if part.kind == "text":
            parts.append({"type": "text", "text": part.text})
        elif part.kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _data_url(next(images))}})
        else:
            data = next(videos)
            assert isinstance(data, bytes), "check_sendable refuses lists of frames"
            parts.append({"type": "video_url", "video_url": {"url": _data_url(data, "video/mp4")}})
    only_text = all(part["type"] == "text" for part in parts)
    content = "".join(part["text"] for part in parts) if only_text else parts
    # OpenAI's clients send null beside calls; of an empty text vLLM makes a part, and the template a line break
    body: dict[str, Any] = {"role": message.role, "content": None if message.tool_calls and not content else content}
    if message.thinking is not None:
        body["reasoning_content"] = message.thinking
    if message.tool_calls:
        body["tool_calls"] = [
            {"type": "function", "id": f"call-{at}", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
            for at, c in enumerate(message.tool_calls)
        ]
    return body


def _data_url(data: bytes, kind: str = "") -> str:
    kind = kind or next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _reason(answer: Answer) -> str:
    """Return the server's own message, in any of the usual forms."""
    text = answer.body[:_REASON_BYTES].decode(errors="replace")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text[:300].strip() or answer.reason
    inner = tree.get("error", tree) if isinstance(tree, dict) else tree
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)[:300]

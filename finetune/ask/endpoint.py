"""Questions over HTTP to any server that speaks OpenAI's chat completions: vLLM, sglang, or a hosted one. No torch.

Media are sent as data URLs, unchanged from the shard: the server resizes them itself. A request that a busy or
restarting server refuses is repeated; an error in the request or the key is raised at once.
"""

import base64
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event, Semaphore, Thread
from typing import Any

from data.format.record import Message, Record
from data.shards.bytes import VideoBytes
from finetune.ask.answers import Reply, Respond, ShownQuestion

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP codes after which a request is repeated."""
_LONGEST_WAIT_S = 60.0
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


class EndpointError(RuntimeError):
    """The server could not be reached, or refused."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server, and how to ask it. `url` may end with or without /v1."""

    url: str
    model: str = ""
    """The model's name at the server; empty: the only one that the server has."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key; if it is not set, no key is sent."""
    timeout: float = 600.0
    attempts: int = 5
    concurrency: int = 8
    wait: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url is {self.url!r}; write http://host:port/v1, as the server prints it at start")
        if not self.timeout > 0:
            raise ValueError(f"--timeout is {self.timeout:g}; a request needs some seconds, above 0")

    @property
    def root(self) -> str:
        """Return the address before /v1."""
        return self.url.rstrip("/").removesuffix("/v1")

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST a body, or GET without one, and return the JSON that comes back; EndpointError if none does."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data=data, headers=headers)  # scheme checked above
        problem, pause = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                self.wait(min(pause or 2.0**attempt * random.uniform(0.5, 1), _LONGEST_WAIT_S))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                problem, pause = self._temporary(error, path), _retry_after(error)
            except (OSError, http.client.HTTPException) as error:
                problem, pause = f"{getattr(error, 'reason', None) or error}", 0.0
            except json.JSONDecodeError as error:
                raise EndpointError(
                    f"{self.root}{path}: what came back is no JSON: {error}. Is it the right address?"
                ) from error
        raise EndpointError(f"{self.root}{path}: no answer after {self.attempts} attempt(s), the last said: {problem}")

    def _temporary(self, error: urllib.error.HTTPError, path: str) -> str:
        """Describe an error after which the request is repeated; raise any other."""
        reason = _reason(error)
        if error.code in AGAIN:
            return f"HTTP {error.code}: {reason}"
        advice = ""
        if error.code in (401, 403):
            is_set = "is set but refused" if os.environ.get(self.key_variable) else "is not set"
            advice = f". The key is read from the environment variable {self.key_variable}, which {is_set}"
        if error.code == 404:
            advice = f". --url should be the server's address up to /v1, and --name a model it has ({self.url})"
        raise EndpointError(f"{self.root}{path}: HTTP {error.code}: {reason}{advice}") from error

    def model_name(self) -> str:
        """Return the name given, or the only one that the server lists."""
        if self.model:
            return self.model
        names = [entry["id"] for entry in self.call("/v1/models")["data"]]
        if len(names) != 1:
            raise ValueError(f"{self.root} serves {', '.join(names) or 'no model'}; choose one with --name")
        return str(names[0])


def _in_threads(
    work: Callable[[ShownQuestion], Reply], most: int
) -> tuple[Callable[[ShownQuestion], Future[Reply]], Event]:
    """Return a function that runs `work` in daemon threads, at most `most` at a time, and an event that stops new ones.

    No pool: Python waits for a pool's threads before it ends, and a silent server would keep it for hours.
    """
    turns, stop = Semaphore(most), Event()

    def start(question: ShownQuestion) -> Future[Reply]:
        future: Future[Reply] = Future()

        def run() -> None:
            with turns:
                if stop.is_set():
                    return
                try:
                    future.set_result(work(question))
                except Exception as error:  # noqa: BLE001 - raised where the result is waited for
                    future.set_exception(error)

        Thread(target=run, daemon=True).start()
        return future

    return start, stop


def remote(endpoint: Endpoint, options: Mapping[str, Any]) -> Respond:
    """Answer through a server, several questions at a time; `options` are OpenAI's, such as max_tokens."""

    def respond(questions: Iterator[ShownQuestion]) -> Iterator[Reply]:
        name = endpoint.model_name()

        def ask(question: ShownQuestion) -> Reply:
            try:
                return reply_of(endpoint.call("/v1/chat/completions", completion_body(question, name, options)))
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
    """Return the request: the conversation in OpenAI's form."""
    images, videos = iter(question.images), iter(question.videos)
    messages = [_message(message, images, videos) for message in question.record.messages]
    calls = 0
    for message in messages:  # OpenAI joins results and calls by name, we by order
        calls = calls + 1 if message["role"] == "tool" else 0
        if calls:
            message["tool_call_id"] = f"call-{calls - 1}"
    body: dict[str, Any] = {"model": model, "messages": messages, **options}
    if question.record.tools:
        body["tools"] = list(question.record.tools)
    return body


def reply_of(body: Any) -> Reply:
    """Return the first choice of a completion."""
    try:
        first = body["choices"][0]
        return Reply(text=first["message"]["content"] or "", finished=first["finish_reason"] != "length")
    except (KeyError, IndexError, TypeError) as error:
        raise EndpointError(f"the server's answer is no chat completion: {json.dumps(body)[:200]}") from error


def check_sendable(record: Record) -> None:
    """Raise on what OpenAI's protocol cannot express."""
    for message in record.messages:
        for part in message.contents:
            if part.kind not in ("text", "image", "video"):
                raise ValueError(f"<{part.kind}> stands in a question; a server is sent text, images and videos only")
    for video in record.videos:
        if video.frames or video.start is not None or video.end is not None:
            raise ValueError(
                "a question shows a range or a list of frames of a video; a server is sent whole files only. Cut the "
                "file, or ask a local model with --model"
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
    body: dict[str, Any] = {"role": message.role, "content": content}
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


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the server's own message, whatever form it has."""
    try:
        body = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        tree = json.loads(body)
    except json.JSONDecodeError:
        return body[:300].strip() or str(error.reason)
    inner = tree.get("error", tree) if isinstance(tree, dict) else tree
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)[:300]


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return float(error.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0

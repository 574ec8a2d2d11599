"""One HTTP request, bounded in time and in size, and the only place where a stranger's answer is taken apart."""

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")
MOST_BYTES = 64 * 2**20
"""What an answer may weigh: one with the log-probabilities of 100,000 tokens weighs a tenth of it."""
_CHUNK_BYTES = 2**16
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class EndpointError(RuntimeError):
    """The server could not be reached, or refused, or said what nobody understands."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    reason: str
    body: bytes
    retry_after: float
    """Seconds after which the server wants to be asked again; 0 where it does not say."""


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Takes the key to the server that it was meant for, and to no other."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = _origin(req.full_url), _origin(newurl)
        if after[0] not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, f"a redirect to {after[0]}: is not followed", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and before != after:
            request.remove_header("Authorization")
        return request


_OPENER = urllib.request.build_opener(_Redirect)


def exchange(request: urllib.request.Request, *, timeout: float) -> Answer:
    """Send a request and return the whole answer within so many seconds, from whatever server.

    OSError or HTTPException where none comes. A thread waits for it: a socket's own limit is for each read.
    """
    deadline = time.monotonic() + timeout
    try:
        return in_thread(lambda: _exchange(request, timeout, deadline)).result(timeout)
    except TimeoutError as error:
        raise TimeoutError(f"no complete answer within {timeout:g} s") from error


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Run `work` in a daemon thread; what it raises is raised where its result is waited for.

    No pool: Python waits for a pool's threads before it ends, and a silent server would keep it for hours.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised where the result is waited for
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def understood(body: bytes, parse: Callable[[Any], Result], *, address: str) -> Result:
    """Parse the JSON that a server sent: whatever is wrong with it, the error names the address."""
    try:
        return parse(json.loads(body))
    except Exception as error:  # noqa: BLE001 - a stranger's words may be wrong in any way
        raise EndpointError(
            f"{address}: what came back is not what OpenAI's protocol says ({type(error).__name__}: {error!s:.100}); "
            f"it begins with {body[:100]!r}. Is it the right address?"
        ) from error


def text_of(value: Any) -> str:
    """Return a text that a server wrote, without halves of surrogate pairs, which no file takes; "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"text must be a string, and is a {type(value).__name__}")
    return _HALF_PAIR.sub("\ufffd", value)


def _exchange(request: urllib.request.Request, timeout: float, deadline: float) -> Answer:
    try:
        reply = _OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        return Answer(
            status=reply.status or 0,
            reason=str(reply.reason),
            body=_read(reply, request.full_url, deadline),
            retry_after=_seconds(reply.headers.get("Retry-After", "0")),
        )


def _read(reply: Any, address: str, deadline: float) -> bytes:
    body = bytearray()
    while chunk := reply.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > MOST_BYTES:
            raise EndpointError(f"{address}: more than {MOST_BYTES // 2**20} MiB came back. Is it the right address?")
        if time.monotonic() > deadline:
            raise TimeoutError
    if reply.length:  # read1 says nothing of it
        raise http.client.IncompleteRead(bytes(body), reply.length)
    return bytes(body)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:  # a date
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port

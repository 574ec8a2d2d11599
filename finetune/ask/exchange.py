"""Makes one HTTP request, bounded in time and size. Only this file parses answers, which cannot be trusted."""

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
"""Largest answer. One with the log-probabilities of 100,000 tokens takes a tenth of it."""
_CHUNK_BYTES = 2**16
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class EndpointError(RuntimeError):
    """The server could not be reached, refused the request, or sent an invalid answer."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A server's answer."""

    status: int
    reason: str
    body: bytes
    retry_after: float
    """Seconds after which the server asks for another attempt; 0 if it does not say."""


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but sends the key only to the server that it was meant for."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = _origin(req.full_url), _origin(newurl)
        if after[0] not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, f"a redirect to {after[0]}: was not followed", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and before != after:
            request.remove_header("Authorization")
        return request


_OPENER = urllib.request.build_opener(_Redirect)


def exchange(request: urllib.request.Request, *, timeout: float) -> Answer:
    """Send a request and return the complete answer within `timeout` seconds, else raise OSError or HTTPException.

    A thread waits for the answer, because a socket's own limit applies to each read.
    """
    deadline = time.monotonic() + timeout
    try:
        return in_thread(lambda: _exchange(request, timeout, deadline)).result(timeout)
    except TimeoutError as error:
        raise TimeoutError(f"no complete answer within {timeout:g} s") from error


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Run `work` in a daemon thread. Its future returns the result or raises the exception.

    This is not a pool: Python joins a pool's threads at exit, and a silent server could delay that for hours.
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
    """Parse the JSON that a server sent; any error in it becomes an EndpointError that names the address."""
    try:
        return parse(json.loads(body))
    except Exception as error:  # noqa: BLE001 - a server's answer may be wrong in any way
        raise EndpointError(
            f"{address}: the answer does not follow OpenAI's protocol ({type(error).__name__}: {error!s:.100}); "
            f"it begins with {body[:100]!r}. Check the address"
        ) from error


def text_of(value: Any) -> str:
    """Return a text that a server wrote, without lone surrogates, which UTF-8 cannot encode; "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"text must be a string, got {type(value).__name__}")
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
            raise EndpointError(f"{address}: the answer has more than {MOST_BYTES // 2**20} MiB. Check the address")
        if time.monotonic() > deadline:
            raise TimeoutError
    if reply.length:  # the answer is incomplete, which read1 does not report
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

"""Fetches a medium over http or https, from public addresses, within limits of bytes and seconds. No torch.

Nobody who writes a row may reach what only this machine reaches, hold it up, or fill its memory.
"""

import http.client
import ipaddress
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

from data.format.fields import redact

MAX_BYTES = 1 << 30
MAX_SECONDS = 120.0
"""Longest time for one medium with all attempts and redirects: a slow server does not hold up a worker."""
SILENCE_S = 30.0
MAX_REDIRECTS = 5
ATTEMPTS = 3
_BLOCK = 1 << 20
_MOVED = (301, 302, 303, 307, 308)
_PASSING = (408, 429)  # that another attempt may cure, as all from 500 on

Span = tuple[int, int]


class NotFetched(ValueError):
    """An attempt failed; the message says why, `again` whether another one makes sense."""

    def __init__(self, reason: str, *, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


def fetch_url(
    url: str,
    span: Span | None,
    *,
    allow_private: bool = False,
    seconds: float = MAX_SECONDS,
    attempts: int = ATTEMPTS,
) -> bytes:
    """Return the body, or a range of it; after `attempts` attempts, a ValueError that holds no secret of the url."""
    end = time.monotonic() + seconds
    problem = ""
    attempt = 0
    while attempt < attempts and time.monotonic() < end:
        time.sleep(0.5 * attempt)
        attempt += 1
        try:
            return _attempt(url, span, allow_private, end)
        except NotFetched as error:
            problem = str(error)
            if not error.again:
                break
    if time.monotonic() >= end:
        problem = f"it took longer than {seconds:g} s ({problem})"
    raise ValueError(f"cannot fetch {redact(url)} after {attempt} attempts: {redact(problem)}")


def _attempt(url: str, span: Span | None, allow_private: bool, end: float) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        _check_url(url)
        sockets: list[socket.socket] = []
        with _ended(sockets, end - time.monotonic()):
            reply = ask_server(partial(_open, url, span, allow_private, sockets))
            try:
                if reply.status not in _MOVED:
                    body = _body(reply, span)
                    if time.monotonic() >= end:  # a body of no known length ends wherever it is cut
                        raise NotFetched(f"got {len(body)} bytes")
                    return body
                place = reply.headers.get("Location")
            finally:
                reply.close()
        if not place:
            raise NotFetched(f"status {reply.status} without a place to go to", again=False)
        url = urljoin(url, place)  # a new request: no header of this one goes along
    raise NotFetched(f"more than {MAX_REDIRECTS} redirects", again=False)


def ask_server(call: Callable[[], Any]) -> Any:
    """Return the result of a call to the web; whatever it raises becomes NotFetched, with its message."""
    try:
        return call()
    except NotFetched:
        raise
    except Exception as error:  # noqa: BLE001  # urllib, http, ssl and the sockets have no common base class
        raise NotFetched(f"{type(error).__name__}: {error}") from error


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise NotFetched(f"the url is not one: {error}", again=False) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise NotFetched(f"{redact(url)!r:.80} is no http:// or https:// url", again=False)
    if parts.username is not None or parts.password is not None:
        raise NotFetched("urls with a user name or password are not fetched; use a signed url, or a file", again=False)
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise NotFetched("the url holds a blank or control character; write it as %20 or the like", again=False)


@contextmanager
def _ended(sockets: list[socket.socket], seconds: float) -> Iterator[None]:
    """Shut these sockets after `seconds`, which ends any wait for a silent or slow server."""

    def shut() -> None:
        for each in sockets:
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # an SSL socket's own shutdown would wait for the server

    timer = threading.Timer(max(0.0, seconds), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _open(url: str, span: Span | None, allow_private: bool, sockets: list[socket.socket]) -> http.client.HTTPResponse:
    headers = {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"} if span else {}
    opener = urllib.request.OpenerDirector()  # neither files nor ftp, no redirects, no errors for a status
    for handler in (urllib.request.ProxyHandler(), _Http(allow_private, sockets), _Https(allow_private, sockets)):
        opener.add_handler(handler)
    reply: http.client.HTTPResponse = opener.open(urllib.request.Request(url, headers=headers), timeout=SILENCE_S)
    return reply


class _Http(urllib.request.HTTPHandler):
    def __init__(self, allow_private: bool, sockets: list[socket.socket]) -> None:
        super().__init__()
        self._allow_private, self._sockets = allow_private, sockets

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(
            _connection(http.client.HTTPConnection, request, self._allow_private, self._sockets), request
        )


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, allow_private: bool, sockets: list[socket.socket]) -> None:
        super().__init__()
        self._allow_private, self._sockets = allow_private, sockets

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(
            _connection(http.client.HTTPSConnection, request, self._allow_private, self._sockets), request
        )


def _connection(
    kind: type[http.client.HTTPConnection],
    request: urllib.request.Request,
    allow_private: bool,
    sockets: list[socket.socket],
) -> Any:
    """Return what urllib calls for a connection, which checks each address before it connects."""
    target = urlsplit(request.full_url)
    by_proxy = request.host != target.netloc
    if by_proxy and not allow_private:
        _check_literal(target.hostname or "")  # names are resolved by the proxy, which is the user's own

    def connect(address: tuple[str, int], timeout: float, _: Any = None) -> socket.socket:
        made = _connect(address, timeout, allow_private=allow_private or by_proxy)
        sockets.append(made)
        return made

    def make(host: str, **more: Any) -> http.client.HTTPConnection:
        connection = kind(host, **more)
        connection._create_connection = connect  # type: ignore[attr-defined]  # http.client's own seam, for tunnels too
        return connection

    return make


def _check_literal(host: str) -> None:
    """Refuse addresses that are not public and written as numbers, in any spelling, and this machine's own name."""
    if host.rstrip(".").lower().endswith("localhost"):
        _check_address(host, ipaddress.ip_address("127.0.0.1"))
    try:
        numbers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return  # a name
    for *_, place in numbers:
        _check_address(host, ipaddress.ip_address(str(place[0]).partition("%")[0]))


def _check_address(host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    # an address of IPv4 may stand in one of IPv6
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if not inner.is_global or inner.is_multicast:
        raise NotFetched(
            f"{host} is {address}, which is no public address; set data.allow_private_addresses=true (or "
            f"--allow-private-addresses) where rows may name servers of your own network",
            again=False,
        )


def _connect(address: tuple[str, int], timeout: float, *, allow_private: bool) -> socket.socket:
    """Connect to the first of the host's addresses that answers; the address that was checked is the one used."""
    host, port = address
    problem: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not allow_private:
            _check_address(host, ipaddress.ip_address(str(place[0]).partition("%")[0]))
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(timeout)
            made.connect(place)
            return made
        except OSError as error:
            made.close()
            problem = error
    raise problem


def _body(reply: http.client.HTTPResponse, span: Span | None) -> bytes:
    """Return the complete body: as long as the server announced, or as the range."""
    if reply.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        again = reply.status in _PASSING or reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        raise NotFetched(f"status {reply.status} {reply.reason}", again=again)
    promised = reply.length
    first, last = 0, MAX_BYTES
    if span is not None:
        first = span[0] if reply.status == HTTPStatus.OK else 0  # a server that ignores ranges sends everything
        last = first + span[1]
    if last > MAX_BYTES or (span is None and (promised or 0) > MAX_BYTES):
        raise NotFetched(f"it has more than {MAX_BYTES:,} bytes; name a file by `path` instead", again=False)
    body = bytearray()
    while len(body) < last and (block := ask_server(partial(reply.read1, min(_BLOCK, last - len(body))))):
        body += block
    if span is not None:
        if len(body) != last:
            raise NotFetched(f"got {max(0, len(body) - first)} bytes instead of {span[1]}")
        return bytes(body[first:])
    if promised is None and len(body) == MAX_BYTES:
        raise NotFetched(f"it has {MAX_BYTES:,} bytes or more; name a file by `path` instead", again=False)
    if promised is not None and len(body) != promised:
        raise NotFetched(f"got {len(body)} bytes instead of {promised}")
    return bytes(body)

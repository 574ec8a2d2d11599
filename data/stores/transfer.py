"""Reads objects over the network through fsspec's drivers, with retries. No secret reaches a message. No torch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data.format.fields import redact
from data.stores.remote import Remote, StoreError

ATTEMPTS = 6
PAUSE_S = 0.5
"""Seconds before the second attempt; each further pause is twice as long."""
SILENCE_S = 60.0
BLOCK = 1 << 20
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs", "az": "azure"}
_ETAGS = ("ETag", "etag", "generation", "blob_id", "Content-MD5", "Last-Modified", "LastModified", "last_modified")
_PASSING = (408, 425, 429)  # that another attempt may cure, as all from 500 on
_KEPT: dict[int, Any] = {}
"""Every driver of this process, by its identity, so that no fork of it collects one.

fsspec forgets its drivers in a fork. The collector would then close a session there, and with it take the sockets of
this process out of the event loop that both share: their next answers would never arrive.
"""

Result = TypeVar("Result")


def driver_of(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a url, and the path in it. fsspec keeps one for all threads of a process."""
    from fsspec.core import url_to_fs  # not needed for data on disks

    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            # a slow server may take its time, a silent one may not; a url is written as its signature was made
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            options = {"client_kwargs": {"timeout": timeout}, "encoded": True}
        driver, path = url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme, "s3")
        raise StoreError(f"{scheme}:// needs a driver ({error}). Run: pip install 'moetune[{extra}]'") from error
    _KEPT[id(driver)] = driver
    return driver, path


def persist(call: Callable[[], Result], url: str) -> Result:
    """Return the result of a call to a store. It is repeated where that may help; then StoreError says what failed."""
    problem, attempt = "", 0
    while attempt < ATTEMPTS:
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        attempt += 1
        try:
            return call()
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001  # each driver raises errors of its own libraries
            cause = error
            if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                cause = error.__cause__  # fsspec says so of every failure to ask a server about an object
            problem = f"{type(cause).__name__}: {cause}"
            if _is_final(cause):
                break
    tried = f" after {attempt} attempts" if attempt > 1 else ""
    raise StoreError(f"cannot read {redact(url)}{tried}: {redact(problem)}")


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING
    return refused or isinstance(error, FileNotFoundError | PermissionError | ImportError)


def remote_from(url: str, info: dict[str, Any]) -> Remote | None:
    """Return the object that a store describes; None if the description lacks its size or version."""
    etag = next((str(info[name]) for name in _ETAGS if info.get(name)), "")
    if not isinstance(info.get("size"), int):
        return None
    return Remote(url=url, etag=etag.removeprefix("W/").strip('"'), size=info["size"])


def look_up(url: str) -> Remote:
    """Ask the store for the present version of an object."""
    driver, path = driver_of(url)

    def ask() -> Remote:
        driver.invalidate_cache()
        found = remote_from(url, driver.info(path))
        if found is None:
            raise StoreError(f"{redact(url)}: the server does not say how long it is (Content-Length)")
        return found

    return persist(ask, url)


def require_unchanged(remote: Remote) -> None:
    """Raise StoreError if the store has another version of the object by now."""
    now = look_up(remote.url)
    if replace(now, url=remote.url) != remote:
        raise StoreError(
            f"{remote.shown} changed while it was used: it had {remote.size:,} bytes and etag {remote.etag!r}, now "
            f"{now.size:,} and {now.etag!r}. Put the former version back, or start again with the new data"
        )


def read_range(remote: Remote, start: int, size: int) -> bytes:
    """Return exactly these bytes of an object, from a server that serves ranges."""
    driver, path = driver_of(remote.url)
    whole = remote.url.startswith("http") and start == 0 and size == remote.size  # needs no ranges

    def read() -> bytes:
        data: bytes = driver.cat_file(path) if whole else driver.cat_file(path, start=start, end=start + size)
        if len(data) != size:
            raise OSError(f"got {len(data):,} bytes instead of {size:,} from byte {start:,}")
        return data

    return persist(read, remote.url)


@cache
def serves_ranges(remote: Remote) -> bool:
    """Say whether the server sends parts of an object; only those of http may not. At most a byte is read."""
    if urlsplit(remote.url).scheme not in ("http", "https") or remote.size < 2:
        return True
    driver, path = driver_of(remote.url)

    def ask() -> bool:
        try:
            with driver.open(path, block_size=1, cache_type="none", size=remote.size) as file:
                file.seek(1)
                return len(file.read(1)) == 1
        except ValueError:  # fsspec's word for a server that sends everything
            return False

    return persist(ask, remote.url)


def read_blocks(remote: Remote) -> Iterator[bytes]:
    """Yield a complete object in blocks, by one request."""
    driver, path = driver_of(remote.url)
    with driver.open(path, block_size=0) as file:
        while block := file.read(BLOCK):
            yield block

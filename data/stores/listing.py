"""Finds the shards that a source names in a store: one object, a folder, a pattern, or a list of urls. No torch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urljoin

from data.format.fields import redact
from data.stores.cache import cache_root
from data.stores.remote import Remote, is_remote, place_of
from data.stores.transfer import driver_of, look_up, persist, remote_from

_AT_ONCE = 16
"""Objects that a store is asked about at a time."""
_LONGEST_LIST = 1 << 26


def remote_shards(patterns: Sequence[str], key: str, cache_dir: Path | None, gigabytes: float | None) -> list[Path]:
    """Return the places in the cache of the shards that these urls name, after the store has been asked about each."""
    if cache_dir is None:
        raise ValueError(
            f"{key} is {redact(patterns[0])!r}, but no folder is set for its shards. Set data.cache_dir (or "
            f"--cache-dir) to a folder on a disk of this machine; it holds at most data.cache_gb"
        )
    root = cache_root(cache_dir, gigabytes)
    found = [entry for pattern in patterns for entry in _expand(pattern, key)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        remotes = list(pool.map(lambda entry: entry if isinstance(entry, Remote) else look_up(entry), found))
    return [place_of(remote, root) for remote in remotes]


def _expand(pattern: str, key: str) -> Iterator[Remote | str]:
    """Yield the objects of a url, or their urls where the store's list does not describe them."""
    if pattern.endswith(".txt"):
        yield from _listed(pattern, key)
    elif pattern.endswith(".tar") and not _is_pattern(pattern):
        yield pattern
    else:
        entries = persist(lambda: _entries(pattern), pattern)
        if not entries:
            raise ValueError(
                f"{key} is {redact(pattern)!r}, where no *.tar is listed. Check the url; for a server that lists no "
                f"folders, write the urls into a text file, one a line, and give that file's url (ending in .txt)"
            )
        yield from entries


def _is_pattern(url: str) -> bool:
    marks = "*[" if url.startswith("http") else "*?["  # behind http, a ? begins a query
    return any(mark in url for mark in marks)


def _entries(pattern: str) -> list[Remote | str]:
    driver, path = driver_of(pattern)
    driver.invalidate_cache()
    if _is_pattern(pattern):
        details = driver.glob(path, detail=True).values()
    else:
        details = driver.ls(path.rstrip("/") + "/", detail=True)
    urls = {driver.unstrip_protocol(info["name"]): info for info in details if info["name"].endswith(".tar")}
    return [_described(url, urls[url]) for url in sorted(urls)]


def _described(url: str, info: dict[str, object]) -> Remote | str:
    remote = remote_from(url, info)
    return remote if remote is not None and remote.etag else url


def _listed(url: str, key: str) -> Iterator[str]:
    """Yield the urls of a text file: one a line, relative ones from where it is; a # begins a comment."""
    driver, path = driver_of(url)
    text = persist(lambda: driver.cat_file(path), url)
    if len(text) > _LONGEST_LIST:
        raise ValueError(f"{key} is {redact(url)!r}, a list of {len(text):,} bytes; at most {_LONGEST_LIST:,} are read")
    lines = [line.strip() for line in text.decode().splitlines()]
    urls = [line for line in lines if line and not line.startswith("#")]
    if not urls:
        raise ValueError(f"{key} is {redact(url)!r}, a list without a url. Write one a line")
    for line in urls:
        absolute = line if "://" in line else _beside(url, line)
        if not is_remote(absolute):
            raise ValueError(f"{key} is {redact(url)!r}, which lists {redact(line)!r:.200}; list urls of stores only")
        yield absolute


def _beside(url: str, name: str) -> str:
    if url.startswith("http"):
        return urljoin(url, name)
    return f"{url.rpartition('/')[0]}/{name}"

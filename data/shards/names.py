"""Names of shards: patterns with braces, and which shards a source's path names. No torch."""

import math
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product
from pathlib import Path

from data.shards.sidecar import note_of, read_note
from data.stores.remote import remote_of

UNPACKED = ".unpacked"
"""Folder for the tars that were inside .tar.gz files; a note beside each says which."""
PATTERN = "*?["
_MOST_SHARDS = 1_000_000


def braces(path: str) -> Iterator[str]:
    """Yield the paths that {000..012} and {a,b} stand for."""
    pieces = re.split(r"(\{[^{}]*\})", path)
    choices = []
    for piece in pieces:
        if numbers := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
            low, high = numbers.groups()
            if int(high) - int(low) >= _MOST_SHARDS:
                raise ValueError(f"{path!r} names more than {_MOST_SHARDS:,} shards; narrow {piece}")
            choices.append([f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)])
        else:
            choices.append(piece[1:-1].split(",") if piece.startswith("{") else [piece])
    if math.prod(map(len, choices)) > _MOST_SHARDS:
        raise ValueError(f"{path!r} names more than {_MOST_SHARDS:,} shards; narrow its braces")
    yield from map("".join, product(*choices))


def names_shard(path: str, shard: Path) -> bool:
    """Say whether a source's path names a shard: itself, a folder above it, or a pattern."""
    plain, patterns = _expanded(path)
    if plain.intersection(map(str, (shard, *shard.parents))):
        return True
    return any(fnmatchcase(str(shard), pattern) for pattern in patterns)


@lru_cache(maxsize=64)
def _expanded(path: str) -> tuple[frozenset[str], tuple[str, ...]]:
    expanded = list(braces(path))
    plain = frozenset(str(Path(each)) for each in expanded if not any(mark in each for mark in PATTERN))
    return plain, tuple(str(Path(each)) for each in expanded if any(mark in each for mark in PATTERN))


def origin_of_shard(shard: Path) -> Path:
    """Return the url of a store's shard, the .tar.gz that a tar was unpacked from, or the shard itself."""
    if (remote := remote_of(shard)) is not None:
        return Path(remote.url)
    note = read_note(note_of(shard)) if shard.parent.name == UNPACKED else None
    return shard if note is None else Path(note["source"])

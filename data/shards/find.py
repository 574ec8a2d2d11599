"""Finds the shards of a source, on a disk or in a store. No torch."""

import glob
from pathlib import Path

from data.format.fields import redact
from data.format.printable import count_of
from data.rows.containers import READERS, kind_of
from data.rows.energon import energon_shards
from data.shards.names import PATTERN, braces
from data.shards.sidecar import missing_shards
from data.shards.unpack import PACKED, unpacked
from data.stores.listing import remote_shards
from data.stores.remote import SCHEMES, is_remote


def find_shards(
    path: str, key: str, *, split: str = "", cache_dir: Path | None = None, cache_gb: float | None = None
) -> list[Path]:
    """Return the shards of a source: one tar, a folder of them, or a pattern with *, ?, {000..012} or {a,b}.

    Those of a store are places in the cache, which are filled when they are read. A .tar.gz is unpacked once, into the
    cache folder or beside it. `split` chooses a part of an Energon folder.
    """
    if path.startswith("pipe:"):
        raise ValueError(f"{key} is {path!r}; commands are never run. Copy the shards, and give a path or a url")
    if "://" in path:
        shards = _shards_of_store(path, key, split, cache_dir, cache_gb)
    else:
        shards = _shards_on_disk(path, key, split)
    if not shards:
        raise ValueError(f"{key} is {path!r}, which contains no *.tar file")
    if len(set(shards)) != len(shards):
        raise ValueError(f"{key} is {redact(path)!r}, which names a shard twice")
    return [unpacked(shard, cache_dir) if shard.name.lower().endswith(PACKED) else shard for shard in shards]


def _shards_of_store(path: str, key: str, split: str, cache_dir: Path | None, cache_gb: float | None) -> list[Path]:
    if not is_remote(path):
        raise ValueError(f"{key} is {redact(path)!r}; the stores are {', '.join(SCHEMES)}")
    if split:
        raise ValueError(f"{key} is {redact(path)!r}, shards of a store without parts, but split is {split!r}")
    urls = list(braces(path))
    for url in urls:
        name = url.partition("?")[0].lower()
        if name.endswith(PACKED):
            raise ValueError(
                f"{key} is {redact(path)!r}, which is compressed, and parts of it cannot be read from a store. "
                f"Unpack it there, or copy it to a disk"
            )
        if kind_of(Path(name)) in READERS:
            raise ValueError(
                f"{key} is {redact(path)!r}, which is a file of rows. Rows are read from a disk only: copy it, or "
                f"upload the shards that `moetune shards build` makes of it"
            )
    return remote_shards(urls, key, cache_dir, cache_gb)


def _shards_on_disk(path: str, key: str, split: str) -> list[Path]:
    shards: list[Path] = []
    for pattern in braces(path):
        if Path(pattern).is_dir():
            shards += _shards_of_folder(Path(pattern), key, split)
        elif any(mark in pattern for mark in PATTERN):
            shards += sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207  # Path.glob refuses absolute patterns
        elif Path(pattern).is_file():
            shards.append(Path(pattern))
        else:
            raise ValueError(f"{key} names {pattern!r}, which does not exist")
    return shards


def _shards_of_folder(folder: Path, key: str, split: str) -> list[Path]:
    if missing := missing_shards(folder):
        raise ValueError(
            f"{key} is {str(folder)!r}, but {count_of(len(missing), 'shard')} of the build in {folder} "
            f"{'are' if len(missing) > 1 else 'is'} missing: {', '.join(missing[:5])}. Copy them there, build "
            f"again, or select the shards to use with a pattern"
        )
    names = energon_shards(folder, split)
    if names is None:
        if split:
            raise ValueError(f"{key} is {str(folder)!r}, a folder of shards without parts, but split is {split!r}")
        return sorted(shard for ending in (".tar", *PACKED) for shard in folder.glob(f"*{ending}"))
    shards = [folder / one for name in names for one in braces(name)]
    if absent := [shard for shard in shards if not shard.is_file()]:
        raise ValueError(f"{key} is {str(folder)!r}, whose notes name {absent[0]}, which does not exist")
    return shards

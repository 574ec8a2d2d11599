"""Finds the shards of a source on disk. No torch.

A remote address is refused here; whoever reads one finds its shards in another way.
"""

import glob
from pathlib import Path

from data.format.printable import count_of
from data.rows.energon import energon_shards
from data.shards.names import PATTERN, braces
from data.shards.sidecar import missing_shards
from data.shards.unpack import PACKED, unpacked

_REMOTE = ("pipe:", "http:", "https:", "s3:", "gs:", "az:", "hf:")


def find_shards(path: str, key: str, *, split: str = "", cache_dir: Path | None = None) -> list[Path]:
    """Return the shards of a source: one tar, a folder of them, or a pattern with *, ?, {000..012} or {a,b}.

    A .tar.gz is unpacked once, into the cache folder or beside it. `split` chooses a part of an Energon folder.
    """
    if path.startswith(_REMOTE):
        raise ValueError(
            f"{key} is {path!r}; shards are read from mounted folders only, and commands are never run. Copy or mount "
            f"them, and give a path"
        )
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
    if not shards:
        raise ValueError(f"{key} is {path!r}, which contains no *.tar file")
    if len(set(shards)) != len(shards):
        raise ValueError(f"{key} is {path!r}, which names a shard twice")
    return [unpacked(shard, cache_dir) if shard.name.lower().endswith(PACKED) else shard for shard in shards]


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

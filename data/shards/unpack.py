"""Unpacks a .tar.gz once, because byte ranges need a plain tar. No torch."""

import gzip
import logging
import shutil
import zlib
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from data.format.tar import ShardError
from data.shards.index import stamp_of
from data.shards.names import UNPACKED
from data.shards.sidecar import note_of, write_note

PACKED = (".tar.gz", ".tgz")
_BLOCK = 1 << 22

log = logging.getLogger(__name__)


def unpacked(shard: Path, cache_dir: Path | None) -> Path:
    """Return the tar inside a .tar.gz, which is written beside it or in the cache folder the first time."""
    folder = (cache_dir or shard.parent) / UNPACKED
    tag = blake2b(f"{shard.absolute()} {stamp_of(shard)}".encode(), digest_size=8).hexdigest()
    place = folder / f"{shard.name.partition('.')[0]}-{tag}.tar"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{uuid4().hex}.part")
    log.warning("unpacking %s into %s, once", shard, place)
    try:
        with gzip.open(shard, "rb") as packed, beside.open("wb") as out:
            shutil.copyfileobj(packed, out, _BLOCK)
        write_note(note_of(place), {"source": str(shard)})
        beside.replace(place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ShardError(shard, f"cannot be unpacked: {error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return place

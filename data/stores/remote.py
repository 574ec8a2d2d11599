"""What a path in the cache stands for: an object in a store, by url, etag and size. No torch.

`<cache>/remote/<id>/<name>` is a shard, whether it is there at the moment or not. The note beside it names the object.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from data.format.fields import redact

SCHEMES = ("http", "https", "s3", "gs", "az", "hf")
FOLDER = "remote"
"""The folder inside `data.cache_dir`."""
_NOTE = ".remote.json"


class StoreError(OSError):
    """An object cannot be had, or the cache cannot hold it. It ends a run: no sample is to blame."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """One version of an object."""

    url: str
    etag: str  # what the store says about its content: an etag, a hash, or the time of its last change
    size: int

    @property
    def shown(self) -> str:
        """The url without its secrets."""
        return redact(self.url)

    @property
    def name(self) -> str:
        """The name of the file, as it would be in a folder."""
        return unquote(PurePosixPath(urlsplit(self.url).path).name)

    @property
    def id(self) -> str:
        """A name for this version, the same for every signature of its url."""
        place = self.url.partition("?")[0] if self.etag else self.url
        text = "\n".join([re.sub("//[^/@]*@", "//", place), self.etag, str(self.size)])
        return blake2b(text.encode(), digest_size=8).hexdigest()


def is_remote(path: str) -> bool:
    """Say whether a source is in a store."""
    scheme, mark, _ = path.partition("://")
    return bool(mark) and scheme in SCHEMES


def place_of(remote: Remote, root: Path) -> Path:
    """Return the path of an object in the cache, and note there, for its owner only, what it stands for."""
    folder = root / remote.id
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{_NOTE}.{os.getpid()}"
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123  # Path.open sets no mode
        json.dump(asdict(remote), file)
    beside.replace(folder / _NOTE)
    return folder / remote.name


def remote_of(path: Path) -> Remote | None:
    """Return what a path stands for, or None for an ordinary file."""
    return _remote_in(path.parent)


@cache
def _remote_in(folder: Path) -> Remote | None:
    try:
        return Remote(**json.loads((folder / _NOTE).read_text()))
    except FileNotFoundError:
        return None

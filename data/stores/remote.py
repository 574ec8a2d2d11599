"""Describes the objects that paths in the cache stand for, by url, etag and size. No torch.

`<cache>/remote/<id>/<name>` is a shard, whether it is there at the moment or not. The note beside it names the object.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
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
        """The name of the file, as it would be in a folder, and never a way out of one."""
        name = self.url.rpartition("/")[2] if not self._is_http else unquote(urlsplit(self.url).path.rpartition("/")[2])
        return re.sub(r"[/\0]", "_", name).lstrip(".") or "shard"

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    @property
    def id(self) -> str:
        """A name for this version, the same for every signature of its url."""
        place = self.url.partition("?")[0] if self.etag and self._is_http else self.url
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
    _remote_in.cache_clear()  # a url may have another signature than before
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

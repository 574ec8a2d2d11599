"""Media inside a zip, by a path that goes on behind its name: `photos.zip/cats/1.jpg`. Nothing is unpacked to disk."""

import os
import re
import zipfile
from functools import lru_cache
from pathlib import Path

MAX_MEMBER = 1 << 32
"""Most bytes read from one member."""
_INSIDE = re.compile(r"(.*?\.zip)/(.+)", re.IGNORECASE)


def inside_zip(path: Path) -> tuple[Path, str] | None:
    """Return the zip and the name of the member that a path names, or None for a plain file."""
    found = _INSIDE.fullmatch(str(path))
    if found is None or not Path(found[1]).is_file():
        return None
    return Path(found[1]), os.path.normpath(found[2])


def read_member(archive: Path, name: str) -> bytes:
    """Return the bytes of a member; ValueError if there is none."""
    try:
        opened = _open(archive, os.getpid())
        if opened.getinfo(name).file_size > MAX_MEMBER:
            raise ValueError(f"{archive}/{name} has more than {MAX_MEMBER:,} bytes")
        return opened.read(name)
    except KeyError as error:
        raise ValueError(f"{archive} contains no {name}") from error
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, or encrypted
        raise ValueError(f"cannot read {name} of {archive}: {error}") from error


@lru_cache(maxsize=4)
def _open(archive: Path, process: int) -> zipfile.ZipFile:
    """Return the open zip; each process needs its own, because a fork shares the position in the file."""
    return zipfile.ZipFile(archive)

"""Folders that are whole or not there: made beside their destination, written through to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its name when the block ends without an error.

    After an error nothing is under `folder` and what was written is removed; a full disk gets a sentence of its own.
    The destination must be absent or empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; remove it or name another folder")
    final = folder.resolve()  # through a link, on the disk that it leads to
    beside = final.with_name(final.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)  # what an interrupted run left; never a finished folder
    try:
        beside.mkdir(parents=True)
        yield beside
        sync_folder(beside)
        beside.rename(final)  # replaces an empty folder
        sync_folder(final.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk that holds {folder.parent} is full, or its quota is used up; the unfinished {folder.name} was "
            f"removed. Free room, or write to another disk",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file through to the disk, making its folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names through to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

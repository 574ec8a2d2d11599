"""Folders that are complete or not there: made beside their destination, written through to disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its name when the block ends without an error.

    After an error nothing is under `folder` and what was written is removed; a full disk gets a message of its own.
    The destination must be absent or empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; remove it or name another folder")
    final = folder.resolve()  # through a link, on the disk that it leads to
    beside = final.with_name(final.name + ".partial")
    handle = -1
    try:
        handle = _claim(beside, folder)
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
        if handle >= 0:  # else it is another process's
            shutil.rmtree(beside, ignore_errors=True)
            os.close(handle)


def _claim(beside: Path, folder: Path) -> int:
    """Make the folder, empty it of what a dead run left, and lock other processes out while the descriptor is open."""
    beside.mkdir(parents=True, exist_ok=True)
    handle = os.open(beside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _locked(handle) or not beside.exists() or not os.path.samestat(os.fstat(handle), beside.stat()):
            raise ValueError(f"{folder} is being written by another process; wait for its end, or name another folder")
        for left in beside.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except BaseException:
        os.close(handle)
        raise
    return handle


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: there, nothing keeps two apart
        return True
    return True


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

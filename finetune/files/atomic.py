"""Folders that are complete or not there: made beside their destination, written through to disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED, REPLACED = ".moetune-unfinished", ".moetune-replaced"
"""Marks in a folder of ours: it is being written, so that a later start may empty it; a newer one is to replace it."""


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its name when the block ends without an error.

    After an error nothing is under `folder` and what was written is removed; a full disk gets a message of its own.
    The destination must be absent or empty. With `replace` it may be an earlier one: it stays, under a mark, until the
    new one is complete, and files of other names in it go to the new one.
    """
    final = folder.resolve()  # through a link, on the disk that it leads to
    is_old = final.exists() and (not final.is_dir() or any(final.iterdir()))
    if is_old and not (replace and final.is_dir()):
        raise ValueError(f"{folder} exists and is not empty; remove it or name another folder")
    beside, aside = (final.with_name(f"{final.name}.{word}") for word in ("partial", "replaced"))
    if is_old and aside.exists() and not is_marked(aside, REPLACED):
        raise ValueError(f"{aside} is in the way of replacing {folder}, and moetune did not make it; move it away")
    handle = -1
    try:
        handle = _claim(beside, folder)
        if is_old:
            write_file(final / REPLACED, b"a newer one is being written\n")
        yield beside
        sync_folder(beside)
        if is_old:
            _take_from(aside, final)
            final.rename(aside)
        beside.rename(final)  # replaces an empty folder
        _take_from(aside, final)
        (final / UNFINISHED).unlink()
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
            with suppress(OSError):
                _clear(beside)
                shutil.rmtree(beside)
            os.close(handle)


def is_marked(folder: Path, mark: str) -> bool:
    """Whether moetune itself left a mark in a folder, which is no link to one."""
    return not folder.is_symlink() and (folder / mark).is_file()


def _take_from(aside: Path, final: Path) -> None:
    """Move what a replaced folder holds beside our own files into the one in its place, and remove the rest."""
    if not is_marked(aside, REPLACED):
        return
    for path in aside.iterdir():
        if path.name not in (UNFINISHED, REPLACED) and not (final / path.name).exists():
            path.rename(final / path.name)
    shutil.rmtree(aside)


def _claim(beside: Path, folder: Path) -> int:
    """Make the folder, empty it of what a dead run left, and lock other processes out while the descriptor is open."""
    if beside.is_symlink() or (beside.exists() and not beside.is_dir()):
        kind = "a symbolic link" if beside.is_symlink() else "a file"
        raise ValueError(
            f"{beside} is {kind}; {folder} is written in a folder of that name until it is complete. Remove or rename "
            f"it, or name another folder than {folder}"
        )
    beside.mkdir(parents=True, exist_ok=True)
    handle = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _locked(handle) or not beside.exists() or not os.path.samestat(os.fstat(handle), beside.stat()):
            raise ValueError(f"{folder} is being written by another process; wait for its end, or name another folder")
        left = list(beside.iterdir())
        if left and not is_marked(beside, UNFINISHED):
            raise ValueError(
                f"{beside} holds files that moetune did not put there ({left[0].name}); {folder} is written in a "
                f"folder of that name until it is complete. Move it away, or name another folder than {folder}"
            )
        _clear(beside)
        write_file(beside / UNFINISHED, b"moetune empties this folder, unless it gets its final name\n")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _clear(beside: Path) -> None:
    """Remove everything but the mark, without which a folder would not be emptied again."""
    for path in beside.iterdir():
        if path.name != UNFINISHED:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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

"""Folders that are complete or absent: made next to their destination, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED, REPLACED = ".moetune-unfinished", ".moetune-replaced"
"""Marks in a folder of ours: it is unfinished, so a later start may empty it; or a newer folder will replace it."""


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder next to `folder` that takes its name when the block ends without an error.

    After an error `folder` does not exist and everything written is removed; a full disk gets a message of its own.
    The destination must be absent or empty. With `replace` it may be an earlier folder: that one stays, under a mark,
    until the new one is complete, and its files with other names move to the new one.
    """
    final = folder.resolve()  # through a link, so that the new folder is on the disk that it leads to
    is_old = final.exists() and (not final.is_dir() or any(final.iterdir()))
    if is_old and not (replace and final.is_dir()):
        raise ValueError(f"{folder} exists and is not empty; remove it, or give another folder")
    beside, aside = (final.with_name(f"{final.name}.{word}") for word in ("partial", "replaced"))
    if is_old and aside.exists() and not is_marked(aside, REPLACED):
        raise ValueError(f"{aside} is in the way of replacing {folder}, and moetune did not make it; move it away")
    handle = -1
    try:
        handle = _claim(beside, folder)
        if is_old:
            write_file(final / REPLACED, b"a newer folder is being written\n")
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
            f"the disk of {folder.parent} is full, or its quota is used up; the unfinished {folder.name} was removed. "
            f"Free some space, or write to another disk",
        ) from error
    finally:
        if handle >= 0:  # otherwise the folder belongs to another process
            with suppress(OSError):
                _clear(beside)
                shutil.rmtree(beside)
            os.close(handle)


def is_marked(folder: Path, mark: str) -> bool:
    """Return whether a folder, not a link to one, has a mark that moetune left."""
    return not folder.is_symlink() and (folder / mark).is_file()


def _take_from(aside: Path, final: Path) -> None:
    """Move the files of a replaced folder that are not ours into the new folder, and remove the rest."""
    if not is_marked(aside, REPLACED):
        return
    for path in aside.iterdir():
        if path.name not in (UNFINISHED, REPLACED) and not (final / path.name).exists():
            path.rename(final / path.name)
    shutil.rmtree(aside)


def _claim(beside: Path, folder: Path) -> int:
    """Make the folder, remove the files of a dead run, and lock out other processes while the descriptor is open."""
    if beside.is_symlink() or (beside.exists() and not beside.is_dir()):
        kind = "a symbolic link" if beside.is_symlink() else "a file"
        raise ValueError(
            f"{beside} is {kind}, but {folder} is written in a folder of that name until it is complete. Remove or "
            f"rename it, or give another folder than {folder}"
        )
    beside.mkdir(parents=True, exist_ok=True)
    handle = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _locked(handle) or not beside.exists() or not os.path.samestat(os.fstat(handle), beside.stat()):
            raise ValueError(f"{folder} is being written by another process; wait for it, or give another folder")
        left = list(beside.iterdir())
        if left and not is_marked(beside, UNFINISHED):
            raise ValueError(
                f"{beside} holds files that moetune did not put there ({left[0].name}), but {folder} is written in a "
                f"folder of that name until it is complete. Move it away, or give another folder than {folder}"
            )
        _clear(beside)
        write_file(beside / UNFINISHED, b"moetune empties this folder unless it gets its final name\n")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _clear(beside: Path) -> None:
    """Remove everything except the mark, without which a later start would not empty the folder."""
    for path in beside.iterdir():
        if path.name != UNFINISHED:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where nothing keeps two processes apart
        return True
    return True


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and flush it to the disk; make its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The coming uses of cached shards, which every reader publishes in the cache's folder. No torch.

A reader writes the steps at which it needs each shard, and where it is. Whoever needs room finds the shard whose next
use is furthest, over all readers of this machine. A reader holds a lock on its file, which ends with its process.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

Uses = np.ndarray[Any, np.dtype[np.uint64]]
"""[uses, 2]: the id of a shard as a number, and a step."""
_FOLDER = "uses"


@contextmanager
def root_lock(root: Path) -> Iterator[None]:
    """Hold the lock of a cache folder, for the moments in which its content is counted or changed."""
    with (root / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Publication:
    """The published uses of one reader."""

    def __init__(self, root: Path, uses: Uses) -> None:
        folder = root / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with root_lock(root):
            number, name = tempfile.mkstemp(dir=folder, suffix=".at")
            fcntl.flock(number, fcntl.LOCK_SH)
        self._file, self._path = number, Path(name)
        np.save(self._path.with_suffix(".npy"), uses)
        self.at(0)

    def at(self, step: int) -> None:
        """Note the step that the reader has come to."""
        os.pwrite(self._file, step.to_bytes(8, "little"), 0)

    def close(self) -> None:
        """Withdraw the uses."""
        _forget(self._path)
        os.close(self._file)


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".npy").unlink(missing_ok=True)


def next_uses(root: Path) -> dict[int, int]:
    """Return the number of steps until a shard is needed next, by id. The caller holds the lock of the folder."""
    due: dict[int, int] = {}
    for path in (root / _FOLDER).glob("*.at"):
        with suppress(FileNotFoundError), path.open("rb") as file:  # its reader may withdraw it meanwhile
            if _is_free(file.fileno()):
                _forget(path)
                continue
            step = int.from_bytes(file.read(8), "little")
            uses: Uses = np.load(path.with_suffix(".npy"), allow_pickle=False)
            for shard, at in first_uses(uses, step):
                due[shard] = min(at - step, due.get(shard, at - step))
    return due


def _is_free(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def first_uses(uses: Uses, step: int) -> list[tuple[int, int]]:
    """Return each shard with its first use from `step` on, in order of these."""
    coming = uses[uses[:, 1] >= step]
    coming = coming[np.argsort(coming[:, 1], kind="stable")]
    shards, places = np.unique(coming[:, 0], return_index=True)
    order = np.argsort(places)
    return list(zip(shards[order].tolist(), coming[places[order], 1].tolist(), strict=True))

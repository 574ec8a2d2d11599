"""Fetches the shards of the coming steps in threads, in the order of their next use. No torch."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.stores.cache import CacheCounts, fetch
from data.stores.remote import remote_of
from data.stores.uses import Publication, Uses, first_uses

THREADS = 4
"""Shards fetched at a time."""
HORIZON = 4096
"""Uses that are looked through for a shard to fetch: many shards, and little work."""
END_S = 2.0
"""Longest wait for the threads at the end: a run that was asked to stop has little time."""
_LOOK_S = 0.2


class ReadAhead:
    """Threads that fetch a reader's shards before it needs them."""

    def __init__(self, root: Path, shards: dict[int, Path], uses: Uses) -> None:
        self.counts = CacheCounts()
        self._shards, self._uses = shards, uses
        self._step = 0
        self._published = Publication(root, uses)
        self._lock = threading.Condition()
        self._closed = False
        self._busy: set[int] = set()
        self._failed: set[int] = set()  # the reader itself meets the error, and reports it
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(min(THREADS, len(shards)))]
        for thread in self._threads:
            thread.start()

    def at(self, step: int) -> None:
        """Note the step that the reader has come to."""
        self._published.at(step)
        with self._lock:
            self._step = step
            self._lock.notify()

    def take_bytes(self) -> int:
        """Return the bytes that were fetched since the last call."""
        with self._lock:
            taken, self.counts.bytes = self.counts.bytes, 0
        return taken

    def close(self) -> None:
        """End the threads. One that fetches a shard may go on for a while, and then ends without a trace."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        end = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._published.close()

    def _run(self) -> None:
        while True:
            with self._lock:
                job = self._next()
                while job is None and not self._closed:
                    self._lock.wait(_LOOK_S)
                    job = self._next()
                if self._closed or job is None:
                    return
                shard, steps = job
                self._busy.add(shard)
            has_room = self._fetch(shard, steps)
            with self._lock:
                self._busy.discard(shard)
                if not has_room and not self._closed:
                    self._lock.wait(_LOOK_S)

    def _fetch(self, shard: int, steps: int) -> bool:
        """Fetch a shard; say whether there was room for it."""
        counts = CacheCounts()
        try:
            file = fetch(self._shards[shard], steps=steps, counts=counts)
        except OSError:
            self._failed.add(shard)
            return True
        with self._lock:
            self.counts.bytes += counts.bytes
        if file is not None:
            os.close(file)
        return file is not None

    def _next(self) -> tuple[int, int] | None:
        """Return the missing shard that is needed first, and the steps until then."""
        start = int(np.searchsorted(self._uses[:, 1], self._step))
        for shard, step in first_uses(self._uses[start : start + HORIZON], self._step):
            if shard not in self._busy and shard not in self._failed and not self._shards[shard].exists():
                return shard, step - self._step
        return None


def uses_of(pairs: Iterable[tuple[int, Path]]) -> tuple[dict[int, Path], Uses]:
    """Return the shards of stores by id, and their uses in order of steps, from steps and the shards they read."""
    ids: dict[Path, int | None] = {}
    rows = set()
    for step, path in pairs:
        if path not in ids:
            remote = remote_of(path)
            ids[path] = None if remote is None else int(remote.id, 16)
        if (number := ids[path]) is not None:
            rows.add((number, step))
    shards = {number: path for path, number in ids.items() if number is not None}
    in_order = sorted(rows, key=lambda row: row[1])
    return shards, np.array(in_order, dtype=np.uint64).reshape(-1, 2)


@contextmanager
def reading_ahead(pairs: Iterable[tuple[int, Path]]) -> Iterator[ReadAhead | None]:
    """Read ahead for the steps of a reader, given with the shards that they read; None if no store is among them."""
    shards, uses = uses_of(pairs)
    if not shards:
        yield None
        return
    ahead = ReadAhead(next(iter(shards.values())).parent.parent, shards, uses)
    try:
        yield ahead
    finally:
        ahead.close()

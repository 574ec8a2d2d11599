"""A bounded cache of shards on a local disk, shared by the processes of a machine. No torch.

A shard is fetched into `.part` under an exclusive lock, checked, and renamed; a process that dies leaves what it has,
and the next one continues. A shared lock protects a shard while it is read. Room is made by removing the shard whose
next use is furthest, never one that is locked.
"""

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from data.stores.remote import FOLDER, Remote, StoreError, remote_of
from data.stores.transfer import persist, read_blocks, read_range, require_unchanged, serves_ranges
from data.stores.uses import next_uses, root_lock

CHUNK = 1 << 23
"""Bytes of one request. Larger shards are read by several at a time, where the server sends ranges."""
STREAMS = 4
"""Requests for one shard at a time."""
DEFAULT_GB = 100.0
_PART = ".part"
_DONE = ".done"
_SUM = ".sum"
_LIMIT = ".limit"
_WAIT_S = 0.05
_BLOCK = 1 << 20


@dataclass(kw_only=True)
class CacheCounts:
    """Counts of the work that the cache did for a reader."""

    hits: int = 0  # reads of shards that were there
    waits: int = 0  # reads that had to wait for a shard
    wait_seconds: float = 0.0
    bytes: int = 0  # fetched from the store

    def __add__(self, other: "CacheCounts") -> "CacheCounts":
        return CacheCounts(
            hits=self.hits + other.hits,
            waits=self.waits + other.waits,
            wait_seconds=self.wait_seconds + other.wait_seconds,
            bytes=self.bytes + other.bytes,
        )


def cache_root(cache_dir: Path, gigabytes: float | None) -> Path:
    """Return the folder of shards, and note how much it may hold; the last run to open it decides."""
    root = cache_dir / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    if gigabytes is not None:
        beside = root / f"{_LIMIT}.{os.getpid()}"
        beside.write_text(json.dumps(gigabytes))
        beside.replace(root / _LIMIT)
    return root


def is_there(path: Path) -> bool:
    """Say whether a shard can be read, from its disk or a store."""
    return path.is_file() or remote_of(path) is not None


def read_sparsely(path: Path, offset: int, size: int, counts: CacheCounts) -> bytes | None:
    """Return a range of a shard that is not in the cache; None if it is, or if its server sends no ranges."""
    remote = remote_of(path)
    if remote is None or path.exists() or not serves_ranges(remote):
        return None
    data = read_range(remote, offset, size)
    counts.bytes += size
    return data


def open_shard(path: Path, counts: CacheCounts | None = None) -> int:
    """Return an open file of a shard in the cache, which holds a shared lock; it is fetched if it is not there."""
    counts = counts or CacheCounts()
    number = _open_locked(path)
    if number is not None:
        counts.hits += 1
        return number
    began = time.perf_counter()
    while (number := fetch(path, counts=counts)) is None:
        time.sleep(_WAIT_S)
    counts.waits += 1
    counts.wait_seconds += time.perf_counter() - began
    return number


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep a shard on the disk meanwhile; nothing happens for one that is no store's."""
    if remote_of(path) is None:
        yield
        return
    number = open_shard(path)
    try:
        yield
    finally:
        os.close(number)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time work on a shard of a store, so that the others find the result."""
    if remote_of(path) is None:
        yield
        return
    with path.with_name(".work").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_locked(path: Path) -> int | None:
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(number, fcntl.LOCK_SH)  # it waits only for a check before a removal; what is removed is read to its end
    return number


def fetch(path: Path, *, steps: int | None = None, counts: CacheCounts | None = None) -> int | None:
    """Fetch a shard and return its open file; None if there is no room for it now.

    `steps`: it is needed in so many steps, and no shard that is needed sooner is removed for it. None: it is needed
    now.
    """
    remote = remote_of(path)
    assert remote is not None, f"{path} is no shard of a store"
    part = path.with_name(_PART)
    number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)  # another process may be fetching it
        if not _is_file(number, part):  # it was, and has renamed or removed it
            os.close(number)
            return _open_locked(path)
        if (there := _open_locked(path)) is not None:  # it was renamed before this part was created
            part.unlink()
            os.close(number)
            return there
        if not os.fstat(number).st_size:  # a new file: a former part was removed to make room
            path.with_name(_DONE).unlink(missing_ok=True)
        if not _make_room(path, remote, number, steps):
            part.unlink()
            os.close(number)
            return None
        read = _transfer(remote, number, path)
        if counts is not None:
            counts.bytes += read
        os.rename(part, path)  # noqa: PTH104  # the open file goes along
        path.with_name(_DONE).unlink(missing_ok=True)
        fcntl.flock(number, fcntl.LOCK_SH)
    except BaseException:
        with suppress(OSError):
            os.close(number)
        raise
    return number


def _is_file(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _limit(root: Path) -> float:
    """Return the most bytes that the cache holds."""
    with suppress(FileNotFoundError):
        return float(json.loads((root / _LIMIT).read_text())) * 1e9
    return DEFAULT_GB * 1e9


def _make_room(path: Path, remote: Remote, number: int, steps: int | None) -> bool:
    """Remove shards until this one fits, and reserve its bytes; say whether there is room."""
    root, limit = path.parent.parent, _limit(path.parent.parent)
    if remote.size > limit:
        raise StoreError(
            f"{remote.shown} has {remote.size / 1e9:.3g} GB, but data.cache_gb={limit / 1e9:g}. Set data.cache_gb to "
            f"several shards at least: those that the workers read at a time"
        )
    with root_lock(root):
        others = [entry for entry in _files(root) if not os.path.samestat(entry[1], os.fstat(number))]
        excess = sum(stat.st_size for _, stat in others) + remote.size - limit
        if excess > 0:
            due = next_uses(root)
            left = {file: due.get(int(file.parent.name, 16), math.inf) for file, _ in others}
            for file, stat in sorted(others, key=lambda entry: (-left[entry[0]], entry[1].st_mtime)):
                if excess <= 0 or (steps is not None and left[file] <= steps):
                    break
                if _remove(file):
                    excess -= stat.st_size
        if excess > 0:
            return False
        with _full_disk(root, limit):
            os.posix_fallocate(number, 0, remote.size)
    return True


def _files(root: Path) -> list[tuple[Path, os.stat_result]]:
    """Return the shards in the cache, complete or not. Names that begin with a dot are notes and sidecars."""
    found = []
    for folder in root.iterdir():
        if len(folder.name) != 16 or not folder.is_dir():
            continue
        for file in folder.iterdir():
            if file.name == _PART or (file.suffix not in (".idx", ".len") and not file.name.startswith(".")):
                with suppress(FileNotFoundError):
                    found.append((file, file.stat()))
    return found


def _remove(file: Path) -> bool:
    """Remove a shard unless a process reads or fetches it."""
    try:
        number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(number)
    return True


@contextmanager
def _full_disk(root: Path, limit: float) -> Iterator[None]:
    """Name the key in the error of a disk that has no room for what the cache may hold."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"{error.strerror} in {root}, although the cache may hold data.cache_gb={limit / 1e9:g}. Lower it below "
            f"what is free there, or set data.cache_dir to a folder on a larger disk"
        ) from error


def _transfer(remote: Remote, number: int, path: Path) -> int:
    """Write an object into a file and check it; return the bytes that were read. What is there already stays."""
    with _full_disk(path.parent.parent, _limit(path.parent.parent)):
        if remote.size <= CHUNK:
            read = _write(number, read_range(remote, 0, remote.size), 0)
        elif serves_ranges(remote):
            read = _transfer_chunks(remote, number, path.with_name(_DONE))
        else:
            read = persist(lambda: _transfer_whole(remote, number), remote.url)
    require_unchanged(remote)
    _check_sum(remote, number, path)
    return read


def _write(number: int, data: bytes, at: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(number, memoryview(data)[done:], at + done)
    return done


def _transfer_chunks(remote: Remote, number: int, note: Path) -> int:
    """Fetch the ranges that an earlier process did not, several at a time; `note` lists those that are written."""
    head = Path("/proc/sys/kernel/random/boot_id").read_text()  # a crash of the machine may lose what was written
    done = note.read_text() if note.exists() else ""
    if not done.startswith(head):
        done = head
        note.write_text(head)
    written = set(done.removeprefix(head).split("\n")[:-1])
    missing = [at for at in range(0, remote.size, CHUNK) if str(at) not in written]

    def get(at: int) -> int:
        size = _write(number, read_range(remote, at, min(CHUNK, remote.size - at)), at)
        with note.open("a") as file:
            file.write(f"{at}\n")
        return size

    with ThreadPoolExecutor(STREAMS) as pool:
        try:
            return sum(pool.map(get, missing))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _transfer_whole(remote: Remote, number: int) -> int:
    at = 0
    for block in read_blocks(remote):
        if at + len(block) > remote.size:
            break
        at += _write(number, block, at)
    if at != remote.size:
        raise OSError(f"got {at:,} bytes instead of {remote.size:,}")
    return at


def _check_sum(remote: Remote, number: int, path: Path) -> None:
    """Compare the file with its checksum of the first time, or keep that; StoreError if they differ."""
    digest = blake2b(digest_size=16)
    for at in range(0, remote.size, _BLOCK):
        digest.update(os.pread(number, min(_BLOCK, remote.size - at), at))
    note = path.with_name(_SUM)
    if not note.exists():
        note.write_text(digest.hexdigest())
    elif note.read_text() != digest.hexdigest():
        path.with_name(_PART).unlink()
        path.with_name(_DONE).unlink(missing_ok=True)
        raise StoreError(
            f"{remote.shown} has another content than before, with the same etag and size. Give changed shards new "
            f"names; {path.parent} keeps what belongs to the former content"
        )

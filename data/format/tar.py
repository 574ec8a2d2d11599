"""Plain tar files: a strict walk over the headers, and a writer whose output depends on content alone."""

import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

BLOCK = 512
_FILE = (b"0", b"\0", b"7")
_SKIPPED = (b"5", b"g", b"K")  # folders, global pax headers, long link names
_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"\x04\x22": "lz4"}
_LONGEST_NAME = 1 << 20
MAX_RECORD = 1 << 26
"""Most bytes of a sample's json, which is parsed in memory."""
MAX_SAMPLE = 1 << 32
"""Most bytes of a sample's members, which are read together."""


class ShardError(ValueError):
    """A shard as a whole is wrong; the message says which one and why."""

    def __init__(self, shard: str | Path, reason: str) -> None:
        super().__init__(f"shard {shard}: {reason}")
        self.shard, self.reason = str(shard), reason

    def __reduce__(self) -> tuple[type["ShardError"], tuple[str, str]]:
        """Pickle both arguments, for the way back from a worker process."""
        return ShardError, (self.shard, self.reason)


@dataclass(frozen=True)
class Member:
    """The name of a file in the tar, and the place of its bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class KeyedMembers:
    """Consecutive members with one key; `names` are what follows the key and its dot."""

    key: str
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def too_large(self) -> str:
        """Why the sample is too large to be read into memory; "" where it is not."""
        record = self.sizes[self.names.index("json")] if "json" in self.names else 0
        if record > MAX_RECORD:
            return f"json has {record:,} bytes; at most {MAX_RECORD:,} of a record are read. Move media out of it"
        if sum(self.sizes) > MAX_SAMPLE:
            return f"its members have {sum(self.sizes):,} bytes; at most {MAX_SAMPLE:,} of a sample are read. Cut it"
        return ""


def walk_tar(path: Path) -> Iterator[Member]:
    """Yield every regular file, with long names of ustar, GNU and PAX; ShardError if the tar is not complete."""
    length = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        name, size_override = "", -1  # what a header before a file says of it
        while True:
            file.seek(at)
            header = file.read(BLOCK)
            if not header:
                raise ShardError(path, f"truncated: ends at byte {at} without an end-of-archive block")
            if header.count(0) == len(header):
                _check_end(path, file, header, at)
                return
            kind, short_name, size = _read_header(path, header, at)
            size, size_override = (size_override, -1) if size_override >= 0 and kind in _FILE else (size, size_override)
            if at + BLOCK + size > length:
                what = name or short_name
                raise ShardError(path, f"truncated: {what!r} needs {at + BLOCK + size} bytes, the file has {length}")
            if kind in _FILE:
                yield Member(name or short_name, at + BLOCK, size)
                name = ""
            elif kind in (b"L", b"x"):
                if size > _LONGEST_NAME:
                    raise ShardError(path, f"long-name header of {size} bytes at byte {at}")
                extra = file.read(size)
                if kind == b"L":
                    name = _text(path, extra.rstrip(b"\0"), at)
                else:
                    name, size_override = _read_pax(path, extra, at, name)
            elif kind not in _SKIPPED:
                raise ShardError(
                    path, f"{short_name!r} at byte {at} is a link or special file; only plain files are read"
                )
            at += BLOCK + -(-size // BLOCK) * BLOCK


def _check_end(path: Path, file: BinaryIO, header: bytes, at: int) -> None:
    if len(header) < BLOCK:
        raise ShardError(path, f"truncated: half an end-of-archive block at byte {at}")
    while padding := file.read(1 << 20):
        if padding.strip(b"\0"):
            raise ShardError(
                path,
                f"goes on after its end-of-archive block at byte {at}: tars laid one behind the other, of which "
                f"readers see the first only. Unpack them, and pack them as one or give each a file",
            )


def _read_header(path: Path, header: bytes, at: int) -> tuple[bytes, str, int]:
    if at == 0 and (kind := _MAGIC.get(header[:2])):
        raise ShardError(path, f"is {kind}-compressed; unpack it: byte ranges need a plain tar")
    if len(header) < BLOCK:
        raise ShardError(path, f"truncated: half a header at byte {at}")
    stored = header[148:156].split(b"\0", 1)[0].strip()
    if _octal(stored) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise ShardError(path, f"not a tar header at byte {at}: wrong checksum")
    raw = header[124:136]
    digits = raw.split(b"\0", 1)[0].strip()
    size = int.from_bytes(raw[1:], "big") if raw[0] & 0x80 else _octal(digits or b"0")
    if size < 0:
        raise ShardError(path, f"unreadable size {raw!r} at byte {at}")
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return header[156:157], _text(path, name, at), size


def _octal(digits: bytes) -> int:
    """Return the number, or -1."""
    return int(digits, 8) if digits and not digits.strip(b"01234567") else -1


def _text(path: Path, raw: bytes, at: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ShardError(path, f"member name at byte {at} is not UTF-8: {raw[:60]!r}") from error


def _read_pax(path: Path, extra: bytes, at: int, name: str) -> tuple[str, int]:
    """Read name and size from records of the form `length key=value`, each ending in a newline."""
    size, start = -1, 0
    while start < len(extra):
        digits, space, _ = extra[start : start + 20].partition(b" ")
        stop = start + int(digits) if digits.isdigit() else start
        record = extra[start + len(digits) + 1 : stop - 1]
        if not space or stop <= start or stop > len(extra) or b"=" not in record:
            raise ShardError(path, f"unreadable pax header at byte {at}")
        key, _, value = record.partition(b"=")
        if key == b"path":
            name = _text(path, value, at)
        elif key == b"size":
            if not value.isdigit():
                raise ShardError(path, f"unreadable size {value!r} in the pax header at byte {at}")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise ShardError(path, f"sparse file at byte {at}; only plain files are read")
        start = stop
    return name, size


def split_name(name: str) -> tuple[str, str]:
    """Split a file name into key and member as webdataset does, at the first dot; members are in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, rest = last.partition(".")
    return folder + slash + stem, rest.lower()


def group_members(path: Path, members: Iterator[Member]) -> Iterator[KeyedMembers]:
    """Yield runs of members with one key; ShardError if a key or a member occurs twice."""
    seen: set[str] = set()
    key, run = "", list[tuple[str, Member]]()
    for member in members:
        name = member.name.removeprefix("./")
        last = name.rpartition("/")[2]
        if last.startswith(".") or (last.startswith("__") and last.endswith("__")):
            continue  # .DS_Store and the like, and webdataset's own notes
        member_key, member_name = split_name(name)
        if member_key != key or not run:
            if run:
                yield _close(path, key, run, seen)
            key, run = member_key, []
        run.append((member_name, member))
    if run:
        yield _close(path, key, run, seen)


def _close(path: Path, key: str, run: Sequence[tuple[str, Member]], seen: set[str]) -> KeyedMembers:
    if key in seen:
        raise ShardError(
            path, f"key {key!r} comes twice: members of one sample must follow each other, keys are unique"
        )
    seen.add(key)
    names = tuple(name for name, _ in run)
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ShardError(path, f"sample {key!r} has {twice} more than once")
    return KeyedMembers(key, names, tuple(m.offset for _, m in run), tuple(m.size for _, m in run))


class TarWriter:
    """Writes a tar beside its place and renames it when it is complete. Equal content gives equal bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beside = path.with_name(f".{path.name}.part")
        self._file: BinaryIO = self._beside.open("wb")

    def add(self, name: str, data: bytes) -> None:
        """Append a file."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        header = info.tobuf(tarfile.PAX_FORMAT)
        with self._named():
            self._file.write(header + data + bytes(-len(data) % BLOCK))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the path in an error of the disk, which by itself does not."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @property
    def size(self) -> int:
        """The number of bytes written so far."""
        return self._file.tell()

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Rename the file if all went well, else remove it."""
        try:
            with self._named():
                if kind is None:
                    self._file.write(bytes(2 * BLOCK))
                    self._file.close()
                    self._beside.replace(self.path)
        finally:
            with suppress(OSError):  # what is still in memory has no room either
                self._file.close()
            self._beside.unlink(missing_ok=True)

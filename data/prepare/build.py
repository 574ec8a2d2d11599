"""Builds shards from rows, in parallel and resumable; refused rows are listed with reasons."""

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.format.record import RecordError
from data.format.tar import TarWriter
from data.prepare.copies import REJECTS
from data.prepare.folder_lock import FolderInUse, modified, release, take, this_process
from data.prepare.rows import RowOptions, build_samples
from data.rows.columns import Columns
from data.rows.files import RowSource, read_source, row_files, stamp_of_rows
from data.shards.bytes import Places
from data.shards.pool import worker_pool
from data.shards.reader import load_index
from data.shards.sidecar import note_of, read_note, sidecar, write_note, write_whole

VERSION = 1
CLAIM = "build.json"  # what a folder of shards was built from
LOCK = ".build.lock"
LOOK_S = 0.5
"""Seconds between checks whether another build, which this one waits for, has ended."""
SILENCE_S = 1800.0
"""Seconds without a byte written after which a build on another host counts as dead."""
MOST_BYTES = 1 << 27
"""Bytes in the cells of rows after which a shard is full: the rows of a shard are in memory together."""
Rows = list[tuple[int, Any, Path]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Settings for building shards from rows."""

    name: str
    samples_per_shard: int = 1000
    media: Literal["embed", "reference"] = "embed"
    media_root: str = ""  # folder where relative paths of media start and which none may leave; "": that of the input
    allow_private: bool = False  # urls may name addresses that are not public
    group: str = ""  # the column that becomes the record's group; empty: `group` itself
    map: str = ""  # the names of columns, as JSON
    config: str = ""  # of a folder of several
    split: str = ""

    def source(self, path: Path) -> RowSource:
        """Return the rows that these options read."""
        return RowSource(path=path, columns=Columns.read(self.map), config=self.config, split=self.split)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(
                f"--name is {self.name!r}; shard names begin with letters, digits, '_', '-' and '.', and no path"
            )


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The outcome of a build."""

    shards: tuple[Path, ...]
    written: int
    rejected: int
    reused: int  # shards that an earlier build of the same file had finished
    ignored: dict[str, int]  # columns nothing here reads, and in how many rows
    rows: int  # of an agent's steps, one becomes several samples


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    written: int
    rejected: int
    ignored: dict[str, int]


@contextmanager
def building(folder: Path, *, waits: bool) -> Iterator[None]:
    """Lock the folder. While another build holds it, wait for its end or raise FolderInUse."""
    mine = this_process()
    waited = False
    while True:
        try:
            take(
                folder / LOCK,
                mine,
                limit=SILENCE_S,
                last_sign=lambda: _last_written(folder),
                say=log.warning,
                cure="give another folder",
            )
            break
        except FolderInUse as error:
            if not waits:
                raise
            if not waited:
                log.warning("waiting for another run, whose shards will be used: %s", error)
            waited = True
            time.sleep(LOOK_S)
    try:
        yield
    finally:
        release(folder / LOCK, mine)


def _last_written(folder: Path) -> float:
    return max(map(modified, folder.glob("*")), default=0.0)


def build_shards(
    source: Path,
    folder: Path,
    options: BuildOptions,
    *,
    jobs: int = 1,
    progress: Callable[[int, str], None] | None = None,
) -> BuildReport:
    """Convert rows. Run again after an interruption, it goes on; `progress` gets the rows done."""
    row_files(options.source(source))  # before the folder is made
    with building(folder, waits=False):
        return build_held(source, folder, options, jobs=jobs, progress=progress)


def build_held(
    source: Path,
    folder: Path,
    options: BuildOptions,
    *,
    jobs: int,
    progress: Callable[[int, str], None] | None,
) -> BuildReport:
    """Do what build_shards does, in a folder that is already locked."""
    _claim(folder, source, options)
    places = Places(root=Path(options.media_root) if options.media_root else None, allow_private=options.allow_private)
    rows = options.source(source)
    of_rows = RowOptions(folder=folder, media=options.media, places=places, columns=rows.columns, group=options.group)
    shards: list[_Shard] = []
    reused = 0

    def finish(shard: _Shard) -> None:
        shards.append(shard)
        if progress:
            refused = sum(each.rejected for each in shards)
            progress(sum(each.rows for each in shards), f"{refused:,} refused")

    tasks = _chunks(read_source(rows), folder, options)
    if jobs <= 1:
        for path, chunk in tasks:
            done = _finished(path)
            reused += done is not None
            finish(done or write_shard(path, chunk, of_rows))
    else:
        with worker_pool(jobs) as pool:
            waiting: list[Future[_Shard]] = []
            for path, chunk in tasks:
                if (done := _finished(path)) is not None:
                    reused += 1
                    finish(done)
                    continue
                waiting.append(pool.submit(write_shard, path, chunk, of_rows))
                if len(waiting) >= 2 * jobs:  # bounds the rows held in memory
                    finish(waiting.pop(0).result())
            for future in waiting:
                finish(future.result())
    if not shards:
        raise ValueError(f"{source} contains no row: it is empty, or was cut off")
    return _close(folder, sorted(shards, key=lambda shard: shard.path), reused)


def _claim(folder: Path, source: Path, options: BuildOptions) -> None:
    """Note what the folder is built from, or refuse a folder with shards of something else."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / CLAIM
    # relative, so that data and shards may be moved, or mounted elsewhere, together
    where = os.path.relpath(source.absolute(), folder.absolute())
    claim = {"version": VERSION, "source": where, "stamp": stamp_of_rows(options.source(source)), **asdict(options)}
    if note.exists():
        earlier = read_note(note)
        if earlier is None:
            raise ValueError(f"{note} is damaged, or of an older moetune; remove {folder} and build it again")
        # an option that is not set and one that an older moetune did not have are the same
        differs = [name for name in claim if (earlier.get(name) or "") != (claim[name] or "")]
        if differs:
            raise ValueError(
                f"{folder} contains shards of another build: {_differences(earlier, claim, differs)}. "
                "Build into another folder, or remove this one"
            )
    elif list(folder.glob("*.tar")):
        raise ValueError(f"{folder} already contains shards; build into an empty folder")
    else:
        write_note(note, claim)


def _differences(earlier: dict[str, Any], claim: dict[str, Any], names: list[str]) -> str:
    if "source" in names:
        return f"they were built from {earlier.get('source')}, not {claim['source']}"
    if "stamp" in names:
        return "the source file changed since the build"
    flags = {name: "--" + name.replace("_", "-") for name in names} | {"allow_private": "--allow-private-addresses"}
    return ", ".join(f"{flags[name]} was {earlier.get(name)!r}, now it is {claim[name]!r}" for name in names)


def _chunks(rows: Iterator[tuple[int, Any, Path]], folder: Path, options: BuildOptions) -> Iterator[tuple[Path, Rows]]:
    """Yield the rows of each shard, with the shard's path."""
    names = (folder / f"{options.name}-{number:06d}.tar" for number in count())
    chunk: Rows = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += bytes_in(row[1])
        if len(chunk) == options.samples_per_shard or size >= MOST_BYTES:
            yield next(names), chunk
            chunk, size = [], 0
    if chunk:
        yield next(names), chunk


def bytes_in(value: Any) -> int:
    """Sum the bytes of all cells that hold media."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(bytes_in, value.values()))
    return sum(map(bytes_in, value)) if isinstance(value, list) else 0


def _finished(path: Path) -> _Shard | None:
    note = read_note(note_of(path)) if path.exists() else None
    if note is None:
        return None
    rejected = len(note["rejects"])
    rows = note.get("rows", note["written"] + rejected)  # an older moetune made one sample of a row
    return _Shard(path, rows, note["written"], rejected, note["ignored"])


def key_of_row(number: int) -> str:
    """Return the key of the sample that a row becomes; rows count from 1."""
    return f"{number:09d}"


def write_shard(path: Path, rows: Rows, options: RowOptions) -> _Shard:
    """Write a shard and its index; a note of refused rows is written before the shard gets its name."""
    rejects: list[dict[str, Any]] = []
    ignored: Counter[str] = Counter()
    written = 0
    with TarWriter(path) as tar:
        for number, row, origin in rows:
            try:
                samples, unused = build_samples(row, options, origin=origin, key=key_of_row(number), shard=path.name)
            except ValueError as error:
                reason = error.reason if isinstance(error, RecordError) else str(error)
                rejects.append({"row": number, "reason": reason})
                continue
            ignored.update(unused)
            for key, members in samples:
                for name, data in members:
                    tar.add(f"{key}.{name}", data)
            written += len(samples)
        note = {"rows": len(rows), "written": written, "rejects": rejects, "ignored": ignored}
        write_note(note_of(path), note)
    load_index(path, places=options.places)
    return _Shard(path, len(rows), written, len(rejects), dict(ignored))


def _close(folder: Path, shards: list[_Shard], reused: int) -> BuildReport:
    ignored: Counter[str] = Counter()
    rejects = []
    for shard in shards:
        ignored.update(shard.ignored)
        rejects += (read_note(note_of(shard.path)) or {"rejects": ()})["rejects"]
        if not shard.written and shard.path.exists():  # a shard of rejects only
            shard.path.unlink()
            sidecar(shard.path, ".idx", None).unlink(missing_ok=True)
    lines = "".join(json.dumps(reject) + "\n" for reject in rejects)
    write_whole(folder / REJECTS, lines.encode())
    return BuildReport(
        shards=tuple(shard.path for shard in shards if shard.written),
        written=sum(shard.written for shard in shards),
        rejected=len(rejects),
        reused=reused,
        ignored=dict(ignored),
        rows=sum(shard.rows for shard in shards),
    )


def repeated_bytes(shards: Sequence[Path]) -> int:
    """Sum the sizes of members that repeat a medium of an earlier sample, by size and checksum."""
    media = [np.zeros((0, 2), dtype=np.int64)]
    for shard in shards:
        index = load_index(shard)
        is_medium = np.array([name != "json" for name in index.names], dtype=bool)
        media.append(np.stack([index.sizes[is_medium], index.crcs[is_medium].astype(np.int64)], axis=1))
    different, copies = np.unique(np.concatenate(media), axis=0, return_counts=True)
    return int((different[:, 0] * (copies - 1)).sum())

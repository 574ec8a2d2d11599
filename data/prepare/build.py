"""From rows of JSON to shards: parallel, resumable, written beside and renamed; refused rows listed with reasons."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data.format.tar import TarWriter
from data.prepare.convert import read_rows
from data.prepare.progress import Progress, count_rows
from data.prepare.rows import RowBuilder
from data.shards.index import sidecar
from data.shards.reader import load_index

VERSION = 1
REJECTS = "rejects.jsonl"
Rows = list[tuple[int, Any]]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How rows become shards."""

    name: str
    samples_per_shard: int = 1000
    media: Literal["embed", "reference"] = "embed"
    media_root: str = ""  # folder of relative media paths; empty: the input file's own

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(
                f"--name is {self.name!r}; shard names begin with letters, digits, '_', '-' and '.', and no path"
            )


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What came of a build."""

    shards: tuple[Path, ...]
    written: int
    rejected: int
    reused: int  # shards that an earlier, interrupted build had finished
    ignored: dict[str, int]  # columns nothing here reads, and in how many rows


@dataclass(frozen=True)
class _Part:
    path: Path
    written: int
    rejected: int
    ignored: dict[str, int]


def build_shards(
    source: Path,
    folder: Path,
    options: BuildOptions,
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Converts a JSONL or JSON file. Run again after an interruption, it goes on; `progress` gets (rows, rejected)."""
    if not source.is_file():
        raise ValueError(f"{source} does not exist or is not a file; give a .jsonl or .json file of rows")
    _claim(folder, source, options)
    builder = RowBuilder(folder=folder, root=Path(options.media_root or source.parent), media=options.media)
    parts: list[_Part] = []
    reused = 0

    def finish(part: _Part) -> None:
        parts.append(part)
        if progress:
            progress(sum(p.written + p.rejected for p in parts), sum(p.rejected for p in parts))

    tasks = _chunks(read_rows(source), folder, options)
    if jobs <= 1:
        for path, rows in tasks:
            done = _finished(path)
            reused += done is not None
            finish(done or write_shard(path, rows, builder))
    else:
        with ProcessPoolExecutor(jobs) as pool:
            waiting: list[Future[_Part]] = []
            for path, rows in tasks:
                if (done := _finished(path)) is not None:
                    reused += 1
                    finish(done)
                    continue
                waiting.append(pool.submit(write_shard, path, rows, builder))
                if len(waiting) >= 2 * jobs:  # bounds the rows held in memory
                    finish(waiting.pop(0).result())
            for future in waiting:
                finish(future.result())
    if not parts:
        raise ValueError(f"{source} holds no row; it is empty, or was cut off")
    return _close(folder, sorted(parts, key=lambda part: part.path), reused)


def _claim(folder: Path, source: Path, options: BuildOptions) -> None:
    """Refuses a folder that holds shards of something else."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "build.json"
    # relative, so that data and shards may be moved, or mounted elsewhere, together
    where = os.path.relpath(source.absolute(), folder.absolute())
    mine = {"version": VERSION, "source": where, "stamp": _stamp(source), **asdict(options)}
    if note.exists():
        theirs = json.loads(note.read_text())
        differs = sorted(name for name in mine if theirs.get(name) != mine[name])
        if differs:
            raise ValueError(
                f"{folder} holds shards that were built otherwise ({', '.join(differs)} differ); "
                "build into another folder or remove this one"
            )
    elif list(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds shards already; build into an empty folder")
    else:
        _write_text(note, json.dumps(mine))


def _stamp(source: Path) -> str:
    digest = blake2b(digest_size=8)
    with source.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text)
    beside.replace(path)


def _chunks(rows: Iterator[tuple[int, Any]], folder: Path, options: BuildOptions) -> Iterator[tuple[Path, Rows]]:
    number = 0
    while chunk := list(islice(rows, options.samples_per_shard)):
        yield folder / f"{options.name}-{number:06d}.tar", chunk
        number += 1


def _notes(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def _finished(path: Path) -> _Part | None:
    if not path.exists() or not _notes(path).exists():
        return None
    notes = json.loads(_notes(path).read_text())
    return _Part(path, notes["written"], len(notes["rejects"]), notes["ignored"])


def write_shard(path: Path, rows: Rows, builder: RowBuilder) -> _Part:
    """One shard and its index; its rejects are noted beside it before it gets its name."""
    rejects: list[dict[str, Any]] = []
    ignored: Counter[str] = Counter()
    written = 0
    with TarWriter(path) as tar:
        for number, row in rows:
            try:
                members, unused = builder.build(row, f"{number:09d}", path.name)
            except ValueError as error:
                rejects.append({"row": number, "reason": getattr(error, "reason", str(error))})
                continue
            ignored.update(unused)
            for name, data in members:
                tar.add(f"{number:09d}.{name}", data)
            written += 1
        _write_text(_notes(path), json.dumps({"written": written, "rejects": rejects, "ignored": ignored}))
    load_index(path)
    return _Part(path, written, len(rejects), dict(ignored))


def _close(folder: Path, parts: list[_Part], reused: int) -> BuildReport:
    ignored: Counter[str] = Counter()
    rejects = []
    for part in parts:
        ignored.update(part.ignored)
        rejects += json.loads(_notes(part.path).read_text())["rejects"]
        if not part.written and part.path.exists():  # a shard of rejects only
            part.path.unlink()
            sidecar(part.path, ".idx", None).unlink(missing_ok=True)
    _write_text(folder / REJECTS, "".join(json.dumps(reject) + "\n" for reject in rejects))
    return BuildReport(
        shards=tuple(part.path for part in parts if part.written),
        written=sum(part.written for part in parts),
        rejected=len(rejects),
        reused=reused,
        ignored=dict(ignored),
    )


def shards_of_rows(
    source: Path, name: str, *, cache_dir: Path | None, jobs: int, limit: int, section: str = "data"
) -> list[Path]:
    """Shards of a JSONL or JSON file, converted the first time and found again after. ValueError above `limit` rejects.

    They lie beside the file, or in the cache folder, under a name made from the file's content: a changed file is
    converted anew.
    """
    if not source.is_file():
        raise ValueError(f"{section}.sources.{name}.path is {str(source)!r}, which does not exist")
    stamp = _stamp(source)
    place = (cache_dir or source.parent) / f"{source.stem}-{stamp}"
    shown = None if (place / REJECTS).exists() else Progress(f"converting {source.name}", count_rows(source))
    # whoever converted it first, and whatever they call the source: the shards are the same
    note = place / "build.json"
    options = BuildOptions(name=json.loads(note.read_text())["name"] if note.exists() else "part")
    report = build_shards(source, place, options, jobs=jobs, progress=shown)
    if report.rejected > limit:
        raise ValueError(
            f"{section}.sources.{name}.path: {report.rejected} of {report.written + report.rejected} rows of {source} "
            f"were refused, data.max_bad_samples={limit}; the reasons are in {place / REJECTS}"
        )
    return list(report.shards)

"""Shards of the rows that a recipe names as a source: converted once, and reused while the file is the same."""

import atexit
import logging
import os
from contextlib import nullcontext, suppress
from glob import escape
from pathlib import Path
from shutil import rmtree
from uuid import uuid4

from data.format.printable import count_of
from data.prepare.build import CLAIM, BuildOptions, build_held, building
from data.prepare.copies import REJECTS, folder_of_shards, stem_of
from data.prepare.folder_lock import is_held, release, take, this_process
from data.prepare.progress import Progress
from data.prepare.recognise import recognise
from data.rows.files import RowSource, count_source, is_pattern
from data.shards.bytes import Places
from data.shards.sidecar import read_note

READERS = ".readers"
"""Folder inside a converted copy, with a lock for each process that reads it."""

log = logging.getLogger(__name__)


def shards_of_rows(
    source: RowSource,
    key: str,
    *,
    cache_dir: Path | None,
    jobs: int,
    limit: int | None = None,
    places: Places | None = None,
) -> list[Path]:
    """Return the shards of rows, which are converted the first time; errors say that `key` names them.

    `limit` is data.max_bad_samples; without it, no row may be refused. The shards lie beside the file, or in the cache
    folder, under a name made from their content: changed rows are converted again, and copies of their earlier
    versions go when no process reads them any more.
    """
    if not source.path.exists() and not is_pattern(source.path):
        raise ValueError(f"{key} is {str(source.path)!r}, which does not exist")
    places = places or Places()
    try:
        place = folder_of_shards(source, cache_dir, places)
        what = recognise(source) if not (place / REJECTS).exists() else ""
    except ValueError as error:
        raise ValueError(f"{key} is {str(source.path)!r}: {error}") from error
    with building(place, waits=True):
        is_new = not (place / REJECTS).exists()
        # an earlier run may have converted it under another source's name: the shards are the same
        options = BuildOptions(
            name=(read_note(place / CLAIM) or {"name": "part"})["name"],
            media_root=str(places.root or ""),
            allow_private=places.allow_private,
            map=source.columns.text,
            config=source.config,
            split=source.split,
        )
        with Progress(f"converting {source.path.name}", count_source(source)) if is_new else nullcontext() as shown:
            report = build_held(source.path, place, options, jobs=jobs, progress=shown)
            if shown is not None:
                shown(report.rows, f"{report.rejected:,} refused, recognised as {what}")
        _register_reader(place)
    if report.rejected > (limit or 0):
        rows = count_of(report.rows, "row")
        bound = "" if limit is None else f", and data.max_bad_samples is {limit}"
        raise ValueError(
            f"{key}: refused {report.rejected} of {rows} of {source.path}{bound}; the reasons are in "
            f"{place / REJECTS}. Correct these rows, or build shards of the others: moetune shards build "
            f"{source.path} --out DIR"
        )
    if report.rejected:
        refused = count_of(report.rejected, "row")
        log.warning("%s of %s refused and left out; the reasons are in %s", refused, source.path, place / REJECTS)
    if is_new:
        _remove_earlier(source, place)
    return list(report.shards)


def _register_reader(place: Path) -> None:
    """Mark the copy as read by this process until it ends."""
    mine = this_process()
    path = place / READERS / f"{mine.host}-{mine.pid}-{mine.started}.json"
    if not path.exists():
        take(path, mine, limit=0.0, last_sign=lambda: 0.0, say=log.warning, cure="remove the file")
        atexit.register(release, path, mine)


def _remove_earlier(source: RowSource, place: Path) -> None:
    """Remove copies of earlier versions of the file, but none that a living process may read."""
    current = read_note(place / CLAIM)
    for other in sorted(place.parent.glob(f"{escape(stem_of(source.path))}-*")):
        note = read_note(other / CLAIM)
        # without a folder of readers, it is of a moetune that did not say who reads
        if note is None or current is None or note["stamp"] == current["stamp"] or not (other / READERS).is_dir():
            continue
        if os.path.normpath(other.absolute() / note["source"]) != os.path.normpath(source.path.absolute()):
            continue
        if any((note.get(name) or "") != current[name] for name in ("map", "config", "split")):
            continue  # another part of the same rows
        aside = other.with_name(f".{other.name}.{uuid4().hex}.removed")
        with suppress(ValueError), building(other, waits=False):  # in use, or a lock that is not ours: it stays
            if any(map(is_held, (other / READERS).iterdir())):
                continue
            other.rename(aside)
            log.warning("removed %s, the converted copy of an earlier version of %s", other, source.path)
        rmtree(aside, ignore_errors=True)

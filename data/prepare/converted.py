"""Rows that a recipe names as a source: converted into shards of the cache once, and reused while they are the same."""

from pathlib import Path

from data.prepare.build import CLAIM, BuildOptions, build_held, building
from data.prepare.convert import REJECTS, folder_of_shards
from data.prepare.progress import Progress, count_rows
from data.shards.bytes import Places
from data.shards.sidecar import read_note


def shards_of_rows(
    source: Path,
    name: str,
    *,
    cache_dir: Path | None,
    jobs: int,
    limit: int,
    section: str = "data",
    places: Places | None = None,
) -> list[Path]:
    """Shards of a JSONL or JSON file, converted the first time and reused afterwards. ValueError above `limit` rejects.

    They lie beside the file, or in the cache folder, under a name made from the file's content: a changed file is
    converted anew.
    """
    if not source.is_file():
        raise ValueError(f"{section}.sources.{name}.path is {str(source)!r}, which does not exist")
    places = places or Places()
    place = folder_of_shards(source, cache_dir, places)
    with building(place, waits=True):
        shown = None if (place / REJECTS).exists() else Progress(f"converting {source.name}", count_rows(source))
        # an earlier run may have converted it under another source's name: the shards are the same
        options = BuildOptions(
            name=(read_note(place / CLAIM) or {"name": "part"})["name"],
            media_root=str(places.root or ""),
            allow_private=places.allow_private,
        )
        report = build_held(source, place, options, jobs=jobs, progress=shown)
    if report.rejected > limit:
        raise ValueError(
            f"{section}.sources.{name}.path: {report.rejected} of {report.written + report.rejected} rows of {source} "
            f"were refused, data.max_bad_samples={limit}; the reasons are in {place / REJECTS}"
        )
    return list(report.shards)

"""The folders of shards of rows that a recipe names as a source. No torch."""

import re
from pathlib import Path

from data.rows.files import RowSource, stamp_of_rows
from data.shards.bytes import Places

REJECTS = "rejects.jsonl"
"""The refused rows with reasons; a build writes this file last."""


def folder_of_shards(source: RowSource, cache_dir: Path | None, places: Places) -> Path:
    """Return the folder for the shards of rows: next to them or in the cache, with the hash of their content."""
    name = f"{stem_of(source.path)}-{stamp_of_rows(source)}{source.suffix}{places.suffix}"
    return (cache_dir or source.path.parent) / name


def stem_of(path: Path) -> str:
    """Return the name that the folders of a source's shards begin with."""
    return re.sub(r"[^\w.-]", "_", path.name if path.is_dir() else path.stem)

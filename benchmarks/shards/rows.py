"""`rows`: rows of a parquet file to decoded images, compared with `datasets`, which decodes the same ones."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from benchmarks.harness.figure import Figure, ratio_at_least
from benchmarks.harness.measure import OutputsDiffer, Side, race
from benchmarks.shards.corpus import write_rows
from data.render.image import decode_image
from data.rows.containers import read_rows
from data.rows.convert import convert_rows
from data.rows.media import place_of

ROWS = 400


def run() -> Iterator[Figure]:
    """Yield the time of one pass; ours also recognises the shape of each row and finds its media."""
    with tempfile.TemporaryDirectory() as name:
        path = _write(Path(name))
        measured = race(
            Side(name="moetune", run=lambda: _ours(path)),
            Side(name="datasets, streaming", run=lambda: _peer(path)),
            same=_same,
            rounds=5,
        )
        config = {"rows": ROWS, "photos": "640x480 JPEG in every row", "file": "parquet, cells of bytes and path"}
        yield measured.figure("rows of parquet", config=config, target=ratio_at_least(1.0))


def _write(folder: Path) -> Path:
    write_rows(folder, 1)
    photos = [(folder / f"{number}.jpg").read_bytes() for number in range(20)]
    rows = [
        {"question": f"{number}?", "answer": "yes", "image": {"bytes": photos[number % 20], "path": f"{number}.jpg"}}
        for number in range(ROWS)
    ]
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    return path


def _ours(path: Path) -> list[int]:
    sums = []
    for _, row in read_rows(path):
        (record,), _ = convert_rows(row)
        place, _ = place_of(record["images"][0], "images[0]")
        sums.append(_sum(decode_image(place["bytes"], name="images[0]").numpy()))
    return sums


def _peer(path: Path) -> list[int]:
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True, features=features)
    return [_sum(np.asarray(row["image"].convert("RGB"))) for row in rows]


def _sum(pixels: "np.ndarray[Any, Any]") -> int:
    """Return a checksum of a few rows of pixels, which costs nothing beside decoding them."""
    return crc32(np.ascontiguousarray(pixels[::97]).tobytes())


def _same(ours: list[int], peer: list[int]) -> None:
    if ours != peer:
        raise OutputsDiffer(f"{sum(a != b for a, b in zip(ours, peer, strict=True))} of {ROWS} images differ")

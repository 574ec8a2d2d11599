"""`shards-build`: build checked, indexed shards from rows and photos, compared with a loop that decodes and writes."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import simplejpeg
import webdataset

from benchmarks.harness.figure import Figure, ratio_at_least
from benchmarks.harness.measure import OutputsDiffer, Side, race
from benchmarks.shards.corpus import write_rows
from data.prepare.build import BuildOptions, build_shards
from data.shards.reader import SampleReader

ROWS = 1000


def run() -> Iterator[Figure]:
    """Yield the time of both; ours also strips each picture's metadata, checks the record and indexes the shard."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder, ROWS)
        for jobs in (1, 2):
            measured = race(
                Side(name=f"moetune shards build, {jobs} processes", run=partial(_ours, rows, folder, jobs, count())),
                Side(name="simplejpeg and webdataset.TarWriter in a loop", run=partial(_peer, rows, folder)),
                same=_same,
                rounds=3,
            )
            config = {"rows": ROWS, "photos": "640x480 JPEG in every other row", "processes": jobs}
            yield measured.figure(f"build, {jobs} processes", config=config, target=ratio_at_least(0.5))


def _ours(rows: Path, folder: Path, jobs: int, numbers: Iterator[int]) -> dict[str, bytes]:
    out = folder / f"ours-{jobs}-{next(numbers)}"
    report = build_shards(rows, out, BuildOptions(name="x", samples_per_shard=250), jobs=jobs)
    reader = SampleReader()
    photos = {}
    for number, shard in enumerate(report.shards):
        record, members = reader.sample(shard, 1)
        photos[f"{record.messages[0].contents[-1].text} {number}"] = next(iter(members.values()))
    reader.bytes.close()
    shutil.rmtree(out)
    return photos


def _peer(rows: Path, folder: Path) -> dict[str, bytes]:
    photos = {}
    with rows.open() as file:
        for shard in range(ROWS // 250):
            with webdataset.TarWriter(str(folder / f"theirs-{shard}.tar")) as sink:
                for number in range(250):
                    row = json.loads(next(file))
                    sample = {"__key__": f"{shard * 250 + number:09d}", "json": row}
                    if row["images"]:
                        sample["0.jpg"] = (folder / row["images"][0]).read_bytes()
                        simplejpeg.decode_jpeg(sample["0.jpg"])  # the check: this picture can be read
                    sink.write(sample)
                    if number == 1:
                        text = row["messages"][0]["content"].removeprefix("<image>")
                        photos[f"{text} {shard}"] = sample["0.jpg"]
    return photos


def _same(ours: dict[str, bytes], peer: dict[str, bytes]) -> None:
    if ours != peer:
        raise OutputsDiffer(f"shards hold different samples: {sorted(ours)} and {sorted(peer)}")

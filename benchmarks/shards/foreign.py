"""`index-foreign`: the index of a tar that another tool wrote, in GB/s, compared with one pass of webdataset."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import webdataset

from benchmarks.harness.figure import Figure, Peer
from benchmarks.harness.measure import Side, spread, take_turns
from benchmarks.shards.corpus import write_rows
from data.shards.reader import load_index

SAMPLES = 4000


def run() -> Iterator[Figure]:
    """Yield the throughput of both; ours reads every byte once, checksums it, and reads sizes and captions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, 1)
        photos = [(folder / f"{number}.jpg").read_bytes() for number in range(20)]
        shard = folder / "laion.tar"
        with webdataset.TarWriter(str(shard), encoder=False, mtime=0) as sink:
            for number in range(SAMPLES):
                sink.write({"__key__": f"{number:09d}", "jpg": photos[number % 20], "txt": f"photo {number}".encode()})
        gigabytes = shard.stat().st_size / 1e9
        sides = [
            Side(name="moetune", run=lambda: len(load_index(shard, force=True))),
            Side(name="webdataset", run=lambda: sum(1 for _ in webdataset.WebDataset(str(shard), shardshuffle=False))),
        ]
        ours, peer = take_turns(sides, rounds=5)
        yield Figure(
            "index of a foreign tar",
            gigabytes / min(ours),
            "GB/s",
            config={"samples": SAMPLES, "photos": "640x480 JPEG", "gigabytes": round(gigabytes, 2)},
            n=len(ours),
            better="higher",
            spread={"ours": spread(ours), "peer": spread(peer)},
            peer=Peer("webdataset, one pass without decoding", gigabytes / min(peer)),
        )

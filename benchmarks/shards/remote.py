"""`remote-throughput`: an epoch from a store in the style of S3, compared with a local disk and with a plain GET loop.

The packs of both sides are compared first. The server is a process of its own. Its limit lies below the rate at which
the samples are decoded, so that a reader that keeps it busy takes as long as the plain loop.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.harness.figure import Figure, Peer, exactly, ratio_at_least
from benchmarks.harness.machine import ROOT
from benchmarks.harness.measure import OutputsDiffer, Side, race
from data.config import ChatConfig, DataConfig, ImageConfig, SourceConfig, VideoConfig
from data.format.tar import TarWriter
from data.open import open_corpus, open_stream
from data.render.sample import Renderer
from finetune.files.tiny import write_tiny

SHARDS = 48
SAMPLES = 8  # of each shard
RATE = 2.5e6
"""Bytes per second of the limited server."""
ROUNDS = 2
Keys = list[tuple[str, ...]]


def run() -> Iterator[Figure]:
    """Yield an epoch from a warm cache beside the disk, one from a limited server beside GETs, the bytes fetched."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "base")
        size = _write_shards(folder / "shards")
        local = _config(str(folder / "shards"), folder / "indexes")
        shown = {"shards": SHARDS, "megabytes": round(size / 1e6), "workers": 0}
        with _server(folder / "shards", RATE) as url:
            remote = _config("s3://bucket/shards", folder / "cache")
            epoch = _opened(folder / "base", remote)
            measured = race(
                Side(name="moetune", run=epoch),
                Side(name="local disk", run=_opened(folder / "base", local)),
                same=_same_packs,
                rounds=7,
            )
            yield measured.figure("warm cache", config=shown, target=ratio_at_least(0.9))
            yield _streaming(folder, epoch, url, size, shown)
            yield _fetched_by_two_ranks(folder, remote, url, size, shown)


def _streaming(folder: Path, epoch: Callable[[], Keys], url: str, size: int, shown: Mapping[str, object]) -> Figure:
    ours, plain = [], []
    for _ in range(ROUNDS):
        _empty(folder / "cache")
        began = time.perf_counter()
        epoch()
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        for path in sorted((folder / "shards").glob("*.tar")):
            urllib.request.urlopen(f"{url}/bucket/shards/{path.name}").read()
        plain.append(time.perf_counter() - began)
    return Figure(
        "streaming from a limited server",
        size / min(ours) / 1e6,
        "MB/s",
        config={**shown, "limit in MB/s": RATE / 1e6},
        n=ROUNDS,
        better="higher",
        peer=Peer("plain GET loop", size / min(plain) / 1e6),
        target=ratio_at_least(0.9),
    )


def _fetched_by_two_ranks(folder: Path, config: DataConfig, url: str, size: int, shown: Mapping[str, object]) -> Figure:
    """Two ranks of one machine read an epoch at the same time, from an empty cache that they share."""
    _empty(folder / "cache")
    before = _sent(url)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        ranks = [pool.submit(_read_rank, folder / "base", config, rank) for rank in range(2)]
        packs = sum((rank.result() for rank in ranks), [])
    _same_packs(sorted(packs), sorted(_opened(folder / "base", config)()))
    times = (_sent(url) - before) / size
    return Figure("bytes fetched over bytes of the data", times, "", config={**shown, "ranks": 2}, target=exactly(1.0))


def _opened(base: Path, config: DataConfig, rank: int = 0, size: int = 1) -> Callable[[], Keys]:
    """Open the data; return a function that reads an epoch, and returns the samples of each pack."""
    renderer = Renderer(base, image=ImageConfig(max_tokens=256), video=VideoConfig(), chat=ChatConfig())
    corpus = open_corpus(config, renderer)

    def read() -> Keys:
        steps = open_stream(config, corpus, renderer, seed=0, rank=rank, size=size)
        return [tuple(batch.keys) for step in steps for batch in step.batches if batch.keys]

    return read


def _read_rank(base: Path, config: DataConfig, rank: int) -> Keys:
    return _opened(base, config, rank, 2)()


def _same_packs(ours: Keys, peer: Keys) -> None:
    if not ours or ours != peer:
        raise OutputsDiffer("the packs from the store are not those from the disk")


def _config(path: str, cache_dir: Path) -> DataConfig:
    return DataConfig(
        packs_per_step=2,
        tokens_per_pack=2048,
        balance_steps=2,
        workers=0,
        remainder="keep",
        cache_dir=str(cache_dir),
        sources={"x": SourceConfig(path=path)},
    )


def _empty(cache_dir: Path) -> None:
    for path in cache_dir.rglob("*.tar"):
        path.unlink()


def _sent(url: str) -> int:
    return int(urllib.request.urlopen(f"{url}/sent-bytes").read())


@contextmanager
def _server(folder: Path, rate: float) -> Iterator[str]:
    """Start the server, and tell the driver about it where it looks."""
    command = [sys.executable, "-m", "benchmarks.shards.object_server", str(folder), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            os.environ |= {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "none",
                "AWS_SECRET_ACCESS_KEY": "none",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            yield url
        finally:
            process.terminate()


def _write_shards(folder: Path) -> int:
    """Write shards of photographs, each with a question; return their bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    turns = [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A pattern."}]
    record = json.dumps({"v": 1, "messages": turns, "images": ["0.jpg"]}).encode()
    photos = []
    for _ in range(SAMPLES):
        noise = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(1)).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    for number in range(SHARDS):
        with TarWriter(folder / f"part-{number:03d}.tar") as writer:
            for at, photo in enumerate(photos):
                writer.add(f"{number:03d}-{at}.json", record)
                writer.add(f"{number:03d}-{at}.0.jpg", photo)
    return sum(path.stat().st_size for path in folder.glob("*.tar"))

"""`data-throughput`: from a shard to the samples of a batch with one worker, compared with webdataset and transformers.

Outputs are compared first: equal tokens, and pixels equal bit for bit after normalisation (with Pillow's backend, which
resizes with other arithmetic, within two grey levels). Our pixels stay uint8; the device normalises them.
"""

import io
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.harness.figure import Figure, ratio_at_least
from benchmarks.harness.machine import ROOT
from benchmarks.harness.measure import OutputsDiffer, Side, race
from benchmarks.shards.workers import two_workers_beside_one
from data.config import ChatConfig, ImageConfig, VideoConfig
from data.format.tar import TarWriter
from data.render.sample import Renderer, Sample
from data.render.vision import normalise, read_spec
from data.shards.reader import SampleReader
from finetune.files.tiny import write_tiny

IMAGE_TOKENS = 1024  # at most one megapixel
IMAGES = [(480, 640), (720, 1280), (1080, 1920), (1000, 1500), (333, 500), (1200, 900)] * 4
CLIPS = 3
GREY_LEVELS = 2.01 / 127.5
ANSWER = "It shows a pattern of stripes that run from one corner to the other. " * 10
ORACLE = Path(sys.prefix) / "oracle"  # the folder of torchvision: see the Makefile
TARGETS = {
    ("images", "pil"): ratio_at_least(4.0, goal=6.0),
    ("images", "torchvision"): ratio_at_least(2.5, goal=4.0),
    ("video", "torchvision"): ratio_at_least(1.5, goal=2.0),
}


def run() -> Iterator[Figure]:
    """Yield the time of one pass over a shard of images and one of videos, then the scaling to two workers."""
    if not (ORACLE / "torchvision").is_dir():
        raise OutputsDiffer(
            f"the peer needs torchvision in {ORACLE}: pip install --no-deps --target {ORACLE} torchvision"
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "base")
        renderer = Renderer(
            folder / "base", image=ImageConfig(max_tokens=IMAGE_TOKENS), video=VideoConfig(), chat=ChatConfig()
        )
        shards = {"images": _write_images(folder / "images.tar"), "video": _write_videos(folder / "video.tar")}
        for (kind, backend), target in TARGETS.items():
            with _peer(folder / "base", shards[kind], backend) as ask:
                _compare(list(_ours(renderer, shards[kind])), ask("outputs"), folder / "base", backend)
                measured = race(
                    Side(name="moetune", run=lambda kind=kind: len(list(_ours(renderer, shards[kind])))),  # type: ignore[misc]  # a default of a lambda has no type
                    Side(name=f"webdataset + transformers ({backend})", run=lambda ask=ask: ask("run")),  # type: ignore[misc]  # a default of a lambda has no type
                    same=_same_number,
                    rounds=5,
                )
            config = {"samples": len(IMAGES) if kind == "images" else CLIPS, "threads": 1, "image_tokens": IMAGE_TOKENS}
            yield measured.figure(f"{kind} beside {backend}", config=config, target=target)
        yield from two_workers_beside_one(renderer, _write_images(folder / "many" / "images.tar", IMAGES * 12))


def _ours(renderer: Renderer, shard: Path) -> Iterator[Sample]:
    reader = SampleReader()
    for number in range(len(reader.index(shard))):
        record, members = reader.sample(shard, number)
        images, videos = reader.media(record, members, shard.parent)
        yield renderer.build(record, images, videos, key=record.id)
    reader.bytes.close()


@contextmanager
def _peer(base: Path, shard: Path, backend: str) -> Iterator[Callable[[str], Any]]:
    arguments = [str(base), str(shard), backend, str(IMAGE_TOKENS * 1024)]
    command = [sys.executable, "-m", "benchmarks.shards.hf_chain", *arguments]
    paths = {"PYTHONPATH": f"{ORACLE}:{ROOT}", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(command, env=paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def ask(what: str) -> Any:
            requests.write(f"{what}\n".encode())
            requests.flush()
            try:
                return pickle.load(answers)  # written by our own child
            except EOFError as error:
                raise OutputsDiffer("the peer's process ended; see its message above") from error

        try:
            yield ask
        finally:
            requests.close()


def _compare(ours: list[Sample], peer: list[dict[str, Any]], base: Path, backend: str) -> None:
    if len(ours) != len(peer):
        raise OutputsDiffer(f"ours has {len(ours)} samples, the peer has {len(peer)}")
    for sample, outputs in zip(ours, peer, strict=True):
        if sample.input_ids.tolist() != outputs["input_ids"][0].tolist():
            raise OutputsDiffer(f"sample {sample.key}: the tokens differ")
        for patches, name in ((sample.image_patches, "pixel_values"), (sample.video_patches, "pixel_values_videos")):
            pixels = normalise(torch.from_numpy(patches), spec=read_spec(base)).numpy()
            apart = float(np.abs(pixels - outputs[name]).max()) if len(pixels) else 0.0
            if apart > (GREY_LEVELS if backend == "pil" else 0.0):
                raise OutputsDiffer(f"sample {sample.key}: {name} differ by {apart}")


def _same_number(ours: int, peer: int) -> None:
    if ours != peer:
        raise OutputsDiffer(f"ours has {ours} samples, the peer has {peer}")


def _record(mark: str, media: str, member: str) -> bytes:
    turns = [{"role": "user", "content": f"<{mark}>What is this?"}, {"role": "assistant", "content": ANSWER}]
    return json.dumps({"v": 1, "messages": turns, media: [member]}).encode()


def _write_images(shard: Path, sizes: Sequence[tuple[int, int]] = IMAGES) -> Path:
    shard.parent.mkdir(exist_ok=True)
    with TarWriter(shard) as writer:
        for number, (height, width) in enumerate(sizes):
            picture = Image.fromarray(_pattern(height, width, number)).filter(ImageFilter.GaussianBlur(2))
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=90)
            writer.add(f"{number:06d}.json", _record("image", "images", "0.jpg"))
            writer.add(f"{number:06d}.0.jpg", file.getvalue())
    return shard


def _write_videos(shard: Path) -> Path:
    """Write clips of 20 s, 640 x 360 at 30 frames per second, with a keyframe every 2 s."""
    with TarWriter(shard) as writer:
        for number in range(CLIPS):
            still, file = _pattern(360, 640, number), io.BytesIO()
            with av.open(file, "w", format="mp4") as container:
                stream = container.add_stream("libx264", rate=Fraction(30))
                stream.height, stream.width = 360, 640
                stream.pix_fmt, stream.gop_size = "yuv420p", 60
                for at in range(600):
                    frame = av.VideoFrame.from_ndarray(np.roll(still, 2 * at, axis=1), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            writer.add(f"{number:06d}.json", _record("video", "videos", "0.mp4"))
            writer.add(f"{number:06d}.0.mp4", file.getvalue())
    return shard


def _pattern(height: int, width: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([(x * 3 + y) % 256, (y * 5) % 256, (x * y // 700) % 256], axis=-1)
    return ((base + rng.integers(0, 40, base.shape)) % 256).astype(np.uint8)

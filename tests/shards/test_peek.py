"""The first samples of a source, seen without its pixels."""

from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from data.format.tar import TarWriter
from data.peek import peek

RECORD = '{"v": 1, "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]'


def shard(folder: Path, name: str, images: str = '["0.png"]', count: int = 3) -> Path:
    with TarWriter(folder / name) as tar:
        for number in range(count):
            tar.add(f"{name[0]}{number}.json", f'{RECORD}, "images": {images}}}'.encode())
            if "0.png" in images:
                tar.add(f"{name[0]}{number}.0.png", b"pixels that nobody opens")
    return folder / name


def test_samples_are_counted_as_far_as_it_matters(tmp_path: Path) -> None:
    shard(tmp_path, "a.tar")
    shard(tmp_path, "b.tar")
    assert (
        peek(SourceConfig(path=str(tmp_path)), "k", DataConfig(), enough=2).at_least == 6
    )  # eight are looked at anyway
    many = peek(SourceConfig(path=str(tmp_path)), "k", DataConfig(), enough=100)
    assert (many.at_least, many.looked_at, many.refused) == (6, 6, ())
    shard(tmp_path, "c.tar", count=50)
    assert peek(SourceConfig(path=str(tmp_path)), "k", DataConfig(), enough=20).at_least == 20


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ('["1.png"]', "a.tar, sample a0: media names ["),
        ('["0.png", "0.png"]', "a.tar, sample a0: images has 2 items, but the messages contain 1 <image> mark"),
        ('[{"path": "far.png"}]', "a.tar, sample a0: images[0]: the file"),
    ],
)
def test_what_a_sample_names_must_be_there(images: str, reason: str, tmp_path: Path) -> None:
    shard(tmp_path, "a.tar", images)
    looked = peek(SourceConfig(path=str(tmp_path)), "k", DataConfig(), enough=1)
    assert len(looked.refused) == looked.looked_at == 3
    assert reason in looked.refused[0]


def test_shards_that_are_cut_off_or_empty_or_none(tmp_path: Path) -> None:
    path = shard(tmp_path, "a.tar", count=20)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"a.tar is cut off \([\d,]+ bytes, without the end of a tar\). Copy it again"):
        peek(SourceConfig(path=str(path)), "k", DataConfig(), enough=1)
    shard(tmp_path, "a.tar", count=0)
    with pytest.raises(ValueError, match="its shards contain no sample"):
        peek(SourceConfig(path=str(path)), "k", DataConfig(), enough=1)
    path.write_bytes(b"\x1f\x8b" + bytes(1022))
    with pytest.raises(ValueError, match="is gzip-compressed; unpack it"):
        peek(SourceConfig(path=str(path)), "k", DataConfig(), enough=1)

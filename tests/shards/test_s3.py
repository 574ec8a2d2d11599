"""Shards behind S3's protocol, spoken by moto's server, with our faulty relay before it."""

from collections import Counter

import boto3
import pytest
from corpora import digest, renderer, write_shards
from moto.server import ThreadedMotoServer
from stores import Relay, running

from data.config import DataConfig, SourceConfig
from data.open import open_corpus, open_stream
from data.shards.find import find_shards
from data.stores import cache, transfer
from data.stores.remote import StoreError

SHARDS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder, SHARDS * 10, per_shard=10)
    return folder


@pytest.fixture(scope="module")
def bucket(folder):
    """A bucket of these shards, behind a relay."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "hidden")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="shards")
    for path in folder.glob("*.tar"):
        client.put_object(Bucket="shards", Key=f"train/{path.name}", Body=path.read_bytes())
    with running(Relay(f"http://{host}:{port}")) as relay:
        patch.setenv("AWS_ENDPOINT_URL", relay.url)
        patch.setattr(transfer, "PAUSE_S", 0.01)
        yield relay
    patch.undo()
    client.close()
    server.stop()


def steps_of(config, size=1):
    corpus = open_corpus(config, renderer())
    packs = {}
    for rank in range(size):
        for step in open_stream(config, corpus, renderer(), seed=3, rank=rank, size=size):
            assert not step.bad
            mine = packs.setdefault(step.step, [])
            mine += [digest(batch) for batch in step.batches if batch.keys]
    return corpus.digest, {step: sorted(mine) for step, mine in packs.items()}


def config_of(path, cache_dir, workers=0, **changes):
    return DataConfig(
        packs_per_step=4,
        tokens_per_pack=384,
        workers=workers,
        cache_dir=str(cache_dir),
        sources={"a": SourceConfig(path=str(path))},
        **changes,
    )


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    return steps_of(config_of(folder, tmp_path_factory.mktemp("indexes")))


def test_a_folder_of_a_bucket_trains_the_steps_of_the_disk(bucket, folder, local, tmp_path):
    assert steps_of(config_of("s3://shards/train", tmp_path)) == local
    gets = Counter(path.rpartition("/")[2] for path in bucket.got if path.endswith(".tar"))
    assert gets == {path.name: 1 for path in folder.glob("*.tar")}


def test_names_patterns_and_what_is_not_there(bucket, folder, tmp_path):
    names = sorted(path.name for path in folder.glob("*.tar"))

    def found(path):
        return [shard.name for shard in find_shards(path, "k", cache_dir=tmp_path)]

    assert found("s3://shards/train/part-00[0-2].tar") == names[:3]
    assert found("s3://shards/train/part-{001..002}.tar") == names[1:3]
    with pytest.raises(StoreError, match=r"cannot read s3://shards/train/none.tar: FileNotFoundError"):
        found("s3://shards/train/none.tar")
    with pytest.raises(ValueError, match=r"where no \*.tar is listed"):
        found("s3://shards/train/none-*.tar")
    places = {shard.parent for shard in find_shards("s3://shards/train", "k", cache_dir=tmp_path)}
    assert places > {shard.parent for shard in find_shards("s3://shards/train/*1.tar", "k", cache_dir=tmp_path)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_steps_are_those_of_the_disk_behind_a_faulty_relay(bucket, local, tmp_path, monkeypatch, size, workers):
    monkeypatch.setattr(cache, "CHUNK", 1 << 13)
    bucket.met.clear()
    bucket.faults[:] = [None, None, ("cut", 3000), ("status", 500), None, ("truncate", 2000), ("status", 503)] * 20
    config = config_of("s3://shards/train", tmp_path, workers, cache_gb=5e-4)
    assert steps_of(config, size) == local
    bucket.faults.clear()
    assert {"cut", "status", "truncate"} == set(bucket.met)

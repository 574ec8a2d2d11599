"""Shards behind http: the same steps as from a disk, exact resume, a bounded cache, and faults of servers by name."""

import fcntl
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import digest, renderer, write_shards
from stores import FileServer, Relay, running

from data.checks import data_problems
from data.config import DataConfig, SourceConfig
from data.format.tar import TarWriter
from data.open import open_corpus, open_stream
from data.shards.find import find_shards
from data.shards.reader import SampleReader, load_index
from data.stores import cache, transfer
from data.stores.ahead import reading_ahead
from data.stores.cache import fetch, open_shard
from data.stores.remote import StoreError, remote_of
from data.stores.uses import Publication, next_uses

SHARDS = 9


def config_of(path, cache_dir=None, **changes):
    values = {"packs_per_step": 4, "tokens_per_pack": 384, "workers": 0, "remainder": "keep"}
    place = {"cache_dir": str(cache_dir)} if cache_dir else {}
    return DataConfig(**(values | place | {"sources": {"a": SourceConfig(path=str(path))}} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder, SHARDS * 10, per_shard=10)
    return folder


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    """The steps from the disk, and the corpus."""
    config = config_of(folder, tmp_path_factory.mktemp("indexes"))
    corpus = open_corpus(config, renderer())
    return read(config, corpus), corpus


@pytest.fixture
def quick(monkeypatch):
    """Retry soon, and read shards in many small ranges."""
    monkeypatch.setattr(transfer, "PAUSE_S", 0.01)
    monkeypatch.setattr(cache, "CHUNK", 1 << 13)


def read(config, corpus, *, size=1, epochs=1, state=None, until=None):
    """Return {(epoch, step): digests of the packs of all ranks}, and the state after step `until`."""
    packs = {}
    for rank in range(size):
        stream = open_stream(config, corpus, renderer(), seed=3, rank=rank, size=size)
        if state:
            stream.load_state_dict(state)
        for _ in range(epochs):
            for step in stream:
                assert not step.bad
                mine = packs.setdefault((step.epoch, step.step), [])
                mine += [digest(batch) for batch in step.batches if batch.keys]
                if until == step.step:
                    return stream.state_dict()
            stream.next_epoch()
    return {place: sorted(of_step) for place, of_step in packs.items()}


def opened(config):
    return config, open_corpus(config, renderer())


def bytes_in(cache_dir):
    return sum(path.stat().st_size for path in cache_dir.rglob("*") if path.name.endswith((".tar", ".part")))


def pattern(server):
    return f"{server.url}/part-{{000..008}}.tar"


LAYOUTS = [(size, workers) for size in (1, 2, 4) for workers in (0, 2)]


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 2)])
def test_the_steps_are_those_of_the_disk(folder, local, tmp_path, size, workers):
    with running(FileServer(folder)) as server:
        config, corpus = opened(config_of(pattern(server), tmp_path, workers=workers))
        assert corpus.digest == local[1].digest
        assert read(config, corpus, size=size) == local[0]
        got = Counter(name for name, _ in server.got)
        assert got == {path.name: 1 for path in folder.glob("*.tar")}, "each shard is fetched once for index and steps"
        opened(config)
        assert len(server.got) == SHARDS, "another start finds indexes and shards"


def test_a_fork_leaves_the_connections_of_its_parent_alone(folder, monkeypatch):
    monkeypatch.setattr(transfer, "SILENCE_S", 2.0)  # a lost answer is noticed after it, and asked for by a GET
    with running(FileServer(folder)) as server:
        url = f"{server.url}/part-000.tar"
        transfer.look_up(url)
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join()
        transfer.look_up(url)
        assert server.got == []


@pytest.mark.slow
@pytest.mark.parametrize(("size", "workers"), LAYOUTS)
def test_the_steps_are_those_of_the_disk_behind_a_faulty_relay(folder, local, tmp_path, quick, size, workers):
    with running(FileServer(folder)) as server, running(Relay(server.url)) as relay:
        relay.faults += [("cut", 3000), ("status", 500), None, ("truncate", 2000), ("status", 503), None] * 20
        config, corpus = opened(config_of(pattern(relay), tmp_path, workers=workers, cache_gb=5e-4))
        assert read(config, corpus, size=size) == local[0]
        assert {"cut", "status", "truncate"} == set(relay.met)


def test_a_faulty_relay_costs_repeats_and_changes_nothing(folder, local, tmp_path, quick):
    with running(FileServer(folder)) as server, running(Relay(server.url)) as relay:
        relay.rate = 4e6
        relay.faults += [("cut", 3000), ("status", 500), ("truncate", 2000), ("status", 429)]
        config, corpus = opened(config_of(pattern(relay), tmp_path))
        assert read(config, corpus) == local[0]
        assert sorted(relay.met) == ["cut", "status", "status", "truncate"]


@pytest.mark.parametrize(("before", "after", "workers"), [(1, 2, 2), (4, 1, 0)])
def test_a_run_resumes_in_another_layout_with_an_empty_cache(folder, local, tmp_path, before, after, workers):
    with running(FileServer(folder)) as server:
        config, corpus = opened(config_of(pattern(server), tmp_path / "one"))
        state = read(config, corpus, size=before, until=1)
        config, corpus = opened(config_of(pattern(server), tmp_path / "two", workers=workers))
        rest = {place: packs for place, packs in local[0].items() if place[1] > 1}
        assert read(config, corpus, size=after, state=state) == rest
        assert rest


def test_a_cache_smaller_than_the_data_stays_below_its_limit(folder, local, tmp_path):
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    whole = sum(path.stat().st_size for path in folder.glob("*.tar"))
    limit = 2 * largest
    assert limit < whole / 3
    with running(FileServer(folder)) as server:
        config, corpus = opened(config_of(pattern(server), tmp_path, cache_gb=limit / 1e9))
        assert 0 < bytes_in(tmp_path) <= limit
        stream = open_stream(config, corpus, renderer(), seed=3, rank=0, size=1)
        packs = {}
        for step in stream:
            packs[step.epoch, step.step] = sorted(digest(batch) for batch in step.batches if batch.keys)
            assert 0 < bytes_in(tmp_path) <= limit
        assert packs == local[0]
        smaller = config_of(pattern(server), tmp_path / "smaller", cache_gb=largest / 2e9)
        with pytest.raises(StoreError, match=r"part-00\d.tar has .* GB, but data.cache_gb=.* Set data.cache_gb to"):
            opened(smaller)


def test_a_server_without_ranges_is_read_as_a_whole(folder, local, tmp_path, quick):
    with running(FileServer(folder, ranges=False)) as server, running(Relay(server.url)) as relay:
        relay.faults += [None, ("cut", 5000)]
        config, corpus = opened(config_of(pattern(relay), tmp_path))
        assert read(config, corpus) == local[0]
        assert relay.met == ["cut"]


def test_large_shards_are_read_by_ranges(folder, local, tmp_path, quick):
    with running(FileServer(folder)) as server:
        config, corpus = opened(config_of(pattern(server), tmp_path))
        assert read(config, corpus) == local[0]
        sizes = [size for _, size in server.got]
        assert max(sizes) == cache.CHUNK
        probes = SHARDS  # of one byte: does this server send ranges?
        assert sum(sizes) == sum(path.stat().st_size for path in folder.glob("*.tar")) + probes


def start(code, *paths):
    """Start a process that runs this code on these paths."""
    names = "import os, sys, numpy, pathlib; from data.stores import cache, uses"
    these = "paths = [*map(pathlib.Path, sys.argv[1:])]"
    return subprocess.Popen([sys.executable, "-c", f"{names}; {these}\n{code}", *map(str, paths)])


def test_a_process_killed_in_the_middle_of_a_write_is_continued(folder, tmp_path, quick):
    name = max(folder.glob("*.tar"), key=lambda path: path.stat().st_size).name
    with running(FileServer(folder)) as server, running(Relay(server.url)) as relay:
        relay.rate = 1e5
        (shard,) = find_shards(f"{relay.url}/{name}", "k", cache_dir=tmp_path)
        process = start(f"cache.CHUNK, cache.STREAMS = {cache.CHUNK}, 1; cache.fetch(paths[0])", shard)
        note = shard.with_name(".done")
        while not note.exists() or note.read_text().count("\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert shard.with_name(".part").exists()
        assert not shard.exists()
        written = note.read_text().count("\n") - 1
        relay.rate, before = None, len(server.got)
        os.close(fetch(shard))
        assert shard.read_bytes() == (folder / name).read_bytes()
        assert not shard.with_name(".part").exists()
        assert not note.exists()
        chunks = -(-shard.stat().st_size // cache.CHUNK)
        # one more asks for ranges, and one of the killed process may have been under way
        assert len(server.got) - before <= chunks - written + 2
        assert written >= 2


def test_two_processes_fetch_each_shard_once(folder, tmp_path):
    with running(FileServer(folder)) as server, running(Relay(server.url)) as relay:
        relay.rate = 1e6
        shards = find_shards(pattern(relay), "k", cache_dir=tmp_path)
        processes = [start("for path in paths: os.close(cache.open_shard(path))", *shards) for _ in range(2)]
        assert [process.wait() for process in processes] == [0, 0]
        assert Counter(name for name, _ in server.got) == {path.name: 1 for path in folder.glob("*.tar")}


@pytest.fixture
def equal(tmp_path):
    """A folder of six files of 1000 bytes, the places in a cache that holds three, and the server."""
    (tmp_path / "equal").mkdir()
    for number in range(6):
        (tmp_path / "equal" / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    with running(FileServer(tmp_path / "equal")) as server:
        url = f"{server.url}/{{0..5}}.tar"
        yield server, find_shards(url, "k", cache_dir=tmp_path / "cache", cache_gb=3.5e-6)


def test_the_shard_whose_next_use_is_furthest_goes_first_and_never_one_in_use(equal):
    _, shards = equal
    ids = [int(remote_of(shard).id, 16) for shard in shards]
    root = shards[0].parent.parent

    def publish(steps):
        return Publication(root, np.array([(ids[shard], step) for shard, step in steps], dtype=np.uint64))

    def present():
        return [number for number, shard in enumerate(shards) if shard.exists()]

    for shard in shards[:3]:
        os.close(fetch(shard))
    one, two = publish([(0, 9), (1, 5), (1, 7)]), publish([(1, 2), (2, 20)])
    assert next_uses(root) == {ids[0]: 9, ids[1]: 2, ids[2]: 20}
    assert fetch(shards[3], steps=20) is None, "all that is there is needed as soon"
    os.close(fetch(shards[3], steps=12))
    assert present() == [0, 1, 3], "shard 2 was needed last"
    with shards[3].open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.close(fetch(shards[4]))
        assert present() == [1, 3, 4], "shard 3, whose use nobody has published, is locked"
    two.at(3)
    one.at(6)
    assert next_uses(root) == {ids[0]: 3, ids[1]: 1, ids[2]: 17}
    one.close()
    two.close()
    assert not next_uses(root)


def test_uses_of_a_dead_process_are_forgotten(equal):
    _, shards = equal
    root = shards[0].parent.parent
    process = start("uses.Publication(paths[0], numpy.array([(1, 1)], numpy.uint64)); os._exit(1)", root)
    assert process.wait() == 1
    assert len(list((root / "uses").iterdir())) == 2
    assert not next_uses(root)
    assert not list((root / "uses").iterdir())


def test_reading_ahead_fetches_what_comes_before_anyone_asks(equal):
    server, shards = equal
    with reading_ahead([(0, shards[4]), (1, shards[2]), (2, shards[4]), (3, shards[0]), (4, shards[5])]) as ahead:
        while not all(shards[number].exists() for number in (4, 2, 0)):
            time.sleep(0.01)
        ahead.at(3)
        while not shards[5].exists():
            time.sleep(0.01)
        assert shards[0].exists()
    assert ahead.counts.bytes == 1000 * len(server.got) >= 4000
    with reading_ahead([(0, Path("local.tar"))]) as ahead:
        assert ahead is None


def test_a_changed_object_is_an_error_that_names_it(equal, tmp_path, quick):
    _, shards = equal
    (tmp_path / "equal/1.tar").write_bytes(b"other" * 200)
    with pytest.raises(StoreError, match=r"/1.tar changed while it was used: it had 1,000 bytes and etag '\w+', now"):
        open_shard(shards[1])


def test_other_content_under_the_same_name_is_an_error(equal, tmp_path, quick):
    _, shards = equal
    os.close(open_shard(shards[1]))
    shards[1].unlink()
    shards[1].with_name(".sum").write_text("another")
    with pytest.raises(StoreError, match=r"/1.tar has another content than before, with the same etag and size"):
        open_shard(shards[1])


def test_what_a_server_refuses_is_named_at_once_and_a_dead_one_after_some_attempts(equal, tmp_path, quick):
    server, shards = equal
    with running(Relay(server.url)) as relay:
        (shard,) = find_shards(f"{relay.url}/1.tar", "k", cache_dir=tmp_path / "cache")
        relay.faults += [("status", 403)]
        with pytest.raises(StoreError, match=r"cannot read http://.*/1.tar: ClientResponseError: 403"):
            open_shard(shard)
        relay.faults += [("status", 500)] * transfer.ATTEMPTS
        with pytest.raises(StoreError, match=rf"cannot read .*/1.tar after {transfer.ATTEMPTS} attempts: .* 500"):
            open_shard(shard)
        assert not relay.faults
    with pytest.raises(StoreError, match=rf"cannot read .*/1.tar after {transfer.ATTEMPTS} attempts: "):
        find_shards(f"{relay.url}/1.tar", "k", cache_dir=tmp_path / "cache")
    with pytest.raises(StoreError, match=r"cannot read .*/none.tar: ClientResponseError: 404"):
        find_shards(f"{server.url}/none.tar", "k", cache_dir=tmp_path / "cache")


def test_a_worker_that_gets_no_shard_ends_the_run_and_no_sample_is_blamed(folder, tmp_path, quick):
    with running(FileServer(folder)) as server:
        config, corpus = opened(config_of(pattern(server), tmp_path, workers=1))
    for shard in corpus.shards:
        shard.unlink()
    with pytest.raises(StoreError, match=rf"^cannot read http://[^\n]* after {transfer.ATTEMPTS} attempts: [^\n]*$"):
        read(config, corpus)


def test_folders_patterns_and_lists_name_shards(folder, tmp_path):
    names = [f"part-{number:03d}.tar" for number in range(SHARDS)]
    (folder / "some.txt").write_text("# of a test\npart-001.tar\n\npart-004.tar\n")
    (folder / "foreign.txt").write_text("file:///etc/passwd\n")
    (folder / "empty.txt").write_text("\n")
    with running(FileServer(folder, lists=True)) as server:

        def found(path):
            return [shard.name for shard in find_shards(f"{server.url}/{path}", "k", cache_dir=tmp_path)]

        assert found("") == names
        assert found("part-00[12]*.tar") == names[1:3]
        assert found("part-{002..003}.tar") == names[2:4]
        assert found("some.txt") == [names[1], names[4]]
        for path, message in (
            ("foreign.txt", "lists 'file:///etc/passwd'; list urls of stores only"),
            ("empty.txt", "a list without a url. Write one a line"),
            ("none-*.tar", r"where no \*.tar is listed. Check the url"),
            ("{part-001,part-001}.tar", "names a shard twice"),
        ):
            with pytest.raises(ValueError, match=message):
                found(path)
        with pytest.raises(ValueError, match=r"no folder is set for its shards. Set data.cache_dir"):
            find_shards(f"{server.url}/", "k")
    for path, message in (("ftp://host/x.tar", "the stores are http, https, s3"), ("pipe:cat x", "never run")):
        with pytest.raises(ValueError, match=message):
            find_shards(path, "k", cache_dir=tmp_path)


def test_no_secret_of_a_url_is_shown_or_changes_its_place(folder, tmp_path, quick):
    with running(FileServer(folder)) as server:
        host = server.url.removeprefix("http://")
        (folder / "signed.txt").write_text(f"http://me:pass@{host}/part-001.tar?signature=hidden\n")
        (shard,) = find_shards(f"{server.url}/signed.txt", "k", cache_dir=tmp_path)
        (plain,) = find_shards(f"{server.url}/part-001.tar", "k", cache_dir=tmp_path / "other")
        assert shard.parent.name == plain.parent.name
        assert shard.parent.joinpath(".remote.json").stat().st_mode & 0o777 == 0o600
        assert remote_of(shard).shown == f"http://***@{host}/part-001.tar?***"
    with pytest.raises(StoreError) as failed:
        fetch(shard)
    assert "hidden" not in str(failed.value)
    assert "pass" not in str(failed.value)
    for path in ("s3://me:pass@bucket/x.tar", "https://host/x.tar?signature=hidden"):
        (problem,) = data_problems(config_of(path, tmp_path))
        assert problem.key == "data.sources.a.path"
        assert "hidden" not in str(problem)
        assert "pass@" not in str(problem)


def test_no_name_in_a_list_leads_out_of_the_cache(folder, tmp_path):
    (folder / "names.txt").write_text("x%2F..%2F..%2F..%2Fout.tar\n")
    (folder / "x").mkdir()
    (folder / "x%2F..%2F..%2F..%2Fout.tar").write_bytes(b"out")
    with running(FileServer(folder)) as server:
        (shard,) = find_shards(f"{server.url}/names.txt", "k", cache_dir=tmp_path / "cache")
        os.close(fetch(shard))
    (folder / "x").rmdir()
    (folder / "x%2F..%2F..%2F..%2Fout.tar").unlink()
    assert shard.name == "x_.._.._.._out.tar"
    assert shard.resolve().is_relative_to(tmp_path / "cache")
    assert shard.read_bytes() == b"out"


def test_media_beside_a_shard_of_a_store_are_refused_by_name(tmp_path):
    row = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "yes"}]}
    row |= {"v": 1, "images": [{"path": "../secret.png"}]}
    (tmp_path / "in").mkdir()
    with TarWriter(tmp_path / "in/part-000.tar") as tar:
        tar.add("0.json", json.dumps(row).encode())
    with running(FileServer(tmp_path / "in")) as server:
        (shard,) = find_shards(f"{server.url}/part-000.tar", "k", cache_dir=tmp_path / "cache")
        reason = load_index(shard).problems[0]
    assert "../secret.png is a file beside http://" in reason
    assert "Put it into the shard, or set data.media_root" in reason


def _fetch_all(shards):
    for shard in shards:
        os.close(fetch(shard))


def test_a_full_disk_ends_with_the_key(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        with running(FileServer(folder)) as server:
            shards = find_shards(pattern(server), "k", cache_dir=small)
            with pytest.raises(StoreError, match=r"No space left.* data.cache_gb="):
                _fetch_all(shards)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_shard_of_which_an_epoch_uses_little_is_read_by_ranges(folder, tmp_path):
    def mixed(place, cache_dir):
        parts = {"a": ("{000..004}", 0.97), "b": ("{005..008}", 0.03)}
        sources = {
            name: SourceConfig(path=f"{place}/part-{numbers}.tar", weight=weight)
            for name, (numbers, weight) in parts.items()
        }
        return opened(config_of("", cache_dir, mixture="samples", sources=sources))

    with running(FileServer(folder)) as server:
        config, corpus = mixed(server.url, tmp_path / "cache")
        for shard in corpus.shards:
            shard.unlink()
        server.got.clear()
        packs = read(config, corpus)
        assert packs == read(*mixed(folder, tmp_path / "indexes"))
        whole = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
        got = Counter()
        for name, size in server.got:
            got[name] += size
        sparse = [shard.name for shard in corpus.shards if shard.name in got and not shard.exists()]
        assert sparse
        assert all(got[name] < whole[name] / 2 for name in sparse)
        assert all(got[shard.name] == whole[shard.name] for shard in corpus.shards if shard.exists())


def test_a_shard_that_changes_while_it_is_read_by_ranges_is_named(tmp_path):
    (path,) = write_shards(tmp_path / "in", 10)
    with running(FileServer(tmp_path / "in")) as server:
        (shard,) = find_shards(f"{server.url}/{path.name}", "k", cache_dir=tmp_path / "cache")
        reader = SampleReader()
        reader.bytes.sparse = {shard}
        before = reader.members(shard, 3)
        shard.unlink()
        assert reader.members(shard, 3) == before
        path.write_bytes(path.read_bytes().replace(b"w", b"x"))
        with pytest.raises(StoreError, match=r"part-000.tar changed while it was used: it had"):
            reader.members(shard, 3)


def test_steps_count_what_the_cache_did(folder, tmp_path):
    with running(FileServer(folder)) as server:
        config, corpus = opened(config_of(pattern(server), tmp_path))
        for shard in corpus.shards:
            shard.unlink()
        stream = open_stream(config, corpus, renderer(), seed=3, rank=0, size=1)
        epochs = []
        for _ in range(2):
            epochs.append(sum((step.reads for step in stream), cache.CacheCounts()))
            stream.next_epoch()
    assert epochs[0].hits + epochs[0].waits == epochs[1].hits == SHARDS * 10
    assert (epochs[1].waits, epochs[1].bytes) == (0, 0)
    assert 0 < epochs[0].bytes <= bytes_in(tmp_path)

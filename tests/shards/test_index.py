"""Tar, index and reader: other tools' tars are read, damage is named, and bytes are found by range."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import LIMIT_S
from PIL import Image

from data.format.record import RecordError
from data.format.tar import ShardError, TarWriter, group_members, split_name, walk_tar
from data.peek import _look_at_sample
from data.shards.bytes import ByteReader
from data.shards.layout import OURS
from data.shards.reader import SampleReader, load_index
from data.shards.sidecar import read_arrays, sidecar, write_arrays


def text_record(answer="yes", **more):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    return json.dumps({"v": 1, "messages": messages, **more}).encode()


def picture(height, width, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(out, kind)
    return out.getvalue()


def image_record(*names):
    return json.dumps(
        {"v": 1, "messages": [{"role": "assistant", "content": "<image>" * len(names)}], "images": list(names)}
    ).encode()


def write(path: Path, *files: tuple[str, bytes]) -> Path:
    with TarWriter(path) as tar:
        for name, data in files:
            tar.add(name, data)
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a/b.json", "d" * 90 + "/" + "k" * 90 + ".json", "tiefe/größe-日本.json"])
def test_walk_agrees_with_tarfile_in_every_format(tmp_path, form, name):
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for member, data in ((name, b"x" * 700), ("b.json", b""), (name + ".2", b"y" * 512)):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            info.mtime = 1.5  # makes pax write a separate header
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "x.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    found = [(m.name, m.offset, m.size) for m in walk_tar(tmp_path / "x.tar")]
    assert found == expected
    assert len(found) == 3


def test_sizes_beyond_octal_and_in_pax_are_read(tmp_path):
    for form, header in ((tarfile.GNU_FORMAT, 1), (tarfile.PAX_FORMAT, 3)):
        info = tarfile.TarInfo("big.mp4")
        info.size = 9 << 30
        head = info.tobuf(form)
        with (tmp_path / "big.tar").open("wb") as file:
            file.write(head)
            file.seek(len(head) + info.size)  # leaves a hole without writing data
            file.write(bytes(1024))
        assert len(head) == header * 512
        assert [(m.offset, m.size) for m in walk_tar(tmp_path / "big.tar")] == [(len(head), 9 << 30)]


def test_webdatasets_own_writer_is_indexed_lazily(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as sink:
        for n in range(3):
            record = json.loads(image_record("0.jpg", "1.png"))
            sink.write(
                {
                    "__key__": f"dir/{n:03d}",
                    "json": record,
                    "0.jpg": picture(40, 60, "JPEG"),
                    "1.png": picture(n + 7, 9),
                }
            )
    index = load_index(tmp_path / "w.tar")
    assert index.keys == ("dir/000", "dir/001", "dir/002")
    assert not index.problems
    assert [(f.height, f.width) for f in index.images(2)] == [(40, 60), (9, 9)]
    assert (tmp_path / "w.tar.idx").exists()
    record, members = SampleReader().sample(tmp_path / "w.tar", 1)
    assert members["1.png"] == picture(8, 9)
    assert record.images[1].member == "1.png"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_equal_content_gives_equal_bytes_and_webdataset_reads_it(tmp_path):
    files = [("a/0.json", text_record()), ("a/0.0.jpg", picture(8, 9, "JPEG")), ("a/1.json", text_record("größe"))]
    one, two = write(tmp_path / "one.tar", *files), write(tmp_path / "two.tar", *files)
    assert one.read_bytes() == two.read_bytes()
    theirs = list(webdataset.WebDataset(str(one), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == ["a/0", "a/1"]
    assert theirs[0]["0.jpg"] == files[1][1]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def fail_halfway():
        with TarWriter(tmp_path / "a.tar") as tar:
            tar.add("x.json", b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_every_truncation_is_named(tmp_path):
    whole = write(tmp_path / "a.tar", ("k1.json", text_record()), ("k2.json", text_record()), ("k2.0.jpg", b"z" * 900))
    data = whole.read_bytes()
    cut = tmp_path / "cut.tar"
    for length in [*range(0, len(data) - 1024, 128), len(data) - 1023]:
        cut.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"cut.tar: truncated: "):
            load_index(cut)
    cut.write_bytes(data[:-512])  # other readers accept a single end block too
    assert len(load_index(cut)) == 2


def test_other_archives_links_and_rubbish_are_refused_by_name(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(ShardError, match="x.tar: is gzip-compressed; unpack it"):
        load_index(path)
    path.write_bytes(b"hello" * 300)
    with pytest.raises(ShardError, match="x.tar: not a tar header at byte 0: wrong checksum$"):
        load_index(path)
    link = tarfile.TarInfo("a.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    path.write_bytes(link.tobuf() + bytes(1024))
    with pytest.raises(ShardError, match="'a.json' at byte 0 is a link or special file"):
        load_index(path)
    with pytest.raises(ShardError, match="none.tar: does not exist"):
        load_index(tmp_path / "none.tar")


def header(**changes):
    """Return a header with some fields overwritten and the checksum corrected."""
    raw = bytearray(tarfile.TarInfo("a.json").tobuf(tarfile.USTAR_FORMAT))
    for at, value in changes.values():
        raw[at : at + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def pax(body):
    return header(kind=(156, b"x"), size=(124, b"%011o" % len(body))) + body + bytes(-len(body) % 512) + header()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (header(size=(124, b"99999999999")), "unreadable size b'99999999999"),
        (header(name=(0, b"\xff\xfe.json")), "member name at byte 0 is not UTF-8"),
        (
            header(kind=(156, b"L"), size=(124, b"%011o" % (2 << 20))) + bytes(2 << 20),
            "long-name header of 2097152 bytes",
        ),
        (pax(b"99 path=x\n"), "unreadable pax header"),
        (pax(b"path=x\n"), "unreadable pax header"),
        (pax(b"10 size=x\n"), "unreadable size b'x' in the pax header"),
        (pax(b"21 GNU.sparse.major=1\n"[:-1].replace(b"21", b"22") + b"\n"), "sparse file at byte 0"),
    ],
)
def test_broken_headers_are_refused_by_name(tmp_path, raw, message):
    path = tmp_path / "x.tar"
    path.write_bytes(raw + bytes(1024))
    with pytest.raises(ShardError, match=message):
        load_index(path)


def test_keys_and_members_that_come_twice_are_refused(tmp_path):
    path = write(tmp_path / "x.tar", ("a.json", b"{}"), ("b.json", b"{}"), ("a.jpg", b""))
    with pytest.raises(ShardError, match="x.tar: key 'a' comes twice"):
        load_index(path)
    path = write(tmp_path / "y.tar", ("a.json", b"{}"), ("a.JSON", b"{}"))
    with pytest.raises(ShardError, match=r"sample 'a' has \['json'\] more than once"):
        load_index(path)


def test_key_ends_at_the_first_dot_of_the_last_component():
    assert split_name("v1.2/a.b.JPG") == ("v1.2/a", "b.jpg")
    assert split_name("a") == ("a", "")


def test_unusable_samples_are_listed_with_reasons_and_affect_no_others(tmp_path):
    path = write(
        tmp_path / "x.tar",
        ("good.json", text_record()),
        ("half.json", image_record("0.jpg")),
        ("dot.v2.json", text_record()),
        ("broken.json", b"{"),
        ("silent.json", b'{"v": 1, "messages": [{"role": "user", "content": "hi"}]}'),
        ("bad.json", image_record("0.png")),
        ("bad.0.png", picture(30, 30)[:20]),
        ("gone.json", image_record({"path": "nowhere.png"})),
        (".DS_Store", b"junk"),
        ("__notes__", b"junk"),
    )
    index = load_index(path)
    reasons = {index.keys[number]: reason for number, reason in index.problems.items()}
    assert sorted(reasons) == ["bad", "broken", "dot", "gone", "half", "silent"]
    assert "half a sample?" in reasons["half"]
    assert "has no json member, only ['v2.json'] (a dot in the key?)" in reasons["dot"]
    assert "Expecting property name" in reasons["broken"]
    assert "nothing supervised" in reasons["silent"]
    assert reasons["bad"].startswith("images[0]: ")
    assert "nowhere.png: No such file" in reasons["gone"]
    assert load_index(path).problems == index.problems
    with pytest.raises(RecordError, match="shard x.tar, sample dot: has no json member"):
        SampleReader().record(path, index.keys.index("dot"))
    assert SampleReader().record(path, 0) == SampleReader().sample(path, 0)[0]


def test_index_is_rebuilt_when_the_tar_changed_or_the_index_is_damaged(tmp_path):
    path = write(tmp_path / "x.tar", ("a.json", text_record()))
    first = load_index(path)
    sidecar(path, ".idx", None).write_bytes(b"PK\x03\x04 rubbish")
    assert load_index(path).digest == first.digest
    write(path, ("a.json", text_record("no")))
    assert load_index(path).digest != first.digest


def zipped(arrays, kind):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as file:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.save(data, array)
            file.writestr(f"{name}.npy", data.getvalue())
    return out.getvalue()


def with_checksum(body):
    return b"moetune sidecar 1 " + hashlib.blake2b(body, digest_size=16).hexdigest().encode() + b"\n" + body


def sidecars(sound, lengths):
    """Yield files that may lie in the place of an index and are not valid ones."""
    _, _, body = sound.partition(b"\n")
    yield body  # the form from before indexes had a checksum
    yield lengths
    yield with_checksum(b"PK\x03\x04 rubbish")
    yield with_checksum(zipped({"head": np.zeros(3)}, zipfile.ZIP_STORED))
    yield with_checksum(zipped({name: np.zeros(1 << 24, np.uint8) for name in "abc"}, zipfile.ZIP_DEFLATED))
    yield with_checksum(zipped({f"a{n}": np.zeros(1) for n in range(40)}, zipfile.ZIP_STORED))
    for at in range(0, len(sound), 97):
        yield sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :]
    yield sound[: len(sound) // 2]


def test_a_sidecar_that_is_not_as_it_was_written_is_made_again(tmp_path):
    path = write(tmp_path / "x.tar", ("a.json", image_record("0.png")), ("a.0.png", picture(6, 5)))
    load_index(path)
    beside = sidecar(path, ".idx", None)
    sound = beside.read_bytes()
    write_arrays(tmp_path / "x.tar.len", {"head": np.zeros(3)})
    for data in sidecars(sound, (tmp_path / "x.tar.len").read_bytes()):
        beside.write_bytes(data)
        assert load_index(path).images(0)[0].height == 6
        assert beside.read_bytes() == sound


def test_a_sidecar_takes_no_more_memory_than_it_is_long(tmp_path):
    bomb = with_checksum(zipped({"a": np.zeros(1 << 26, np.uint8)}, zipfile.ZIP_DEFLATED))
    (tmp_path / "x").write_bytes(bomb)
    tracemalloc.start()
    assert read_arrays(tmp_path / "x") is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(end):
    program = (
        "import sys, time; from data.shards.pool import worker_pool\n"
        "with worker_pool(2) as pool:\n"
        "    tasks = [pool.submit(time.sleep, 900) for _ in range(2)]\n"
        "    print(*pool._processes, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(is_alive, workers))
        parent.send_signal(end)
    deadline = time.monotonic() + LIMIT_S
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_cache_folder_keeps_shards_of_one_name_apart(tmp_path):
    cache = tmp_path / "cache"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.tar", (f"{folder}.json", text_record()))
    found = [load_index(tmp_path / folder / "x.tar", cache_dir=cache).keys for folder in ("one", "two", "one")]
    assert found == [("one",), ("two",), ("one",)]
    assert len(list(cache.iterdir())) == 2
    assert not list((tmp_path / "one").glob("*.idx"))


def test_index_that_cannot_be_written_names_the_remedy(tmp_path):
    path = write(tmp_path / "x.tar", ("a.json", text_record()))
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="cannot write the index: .*; set data.cache_dir"):
        load_index(path, cache_dir=tmp_path / "file")


def test_changed_bytes_are_caught_when_read(tmp_path):
    path = write(tmp_path / "x.tar", ("a.json", text_record()), ("b.json", bytes(1 << 18)), ("c.json", text_record()))
    load_index(path)
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1  # same size and same ends, so the stamp still matches
    path.write_bytes(data)
    reader = SampleReader()
    assert reader.members(path, 2) == {"json": text_record()}
    with pytest.raises(
        RecordError, match="shard x.tar, sample b: json changed since it was indexed; run: moetune shards"
    ):
        reader.members(path, 1)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(RecordError, match="shard x.tar, sample c: .* ends too early"):
        reader.members(path, 2)


def test_shared_media_are_read_by_path_and_range(tmp_path):
    blob = b"junk" + picture(6, 5) + b"more junk"
    (tmp_path / "all.bin").write_bytes(blob)
    place = {"path": "all.bin", "range": [4, len(picture(6, 5))]}
    path = write(
        tmp_path / "x.tar",
        ("a.json", image_record(place)),
        ("b.json", image_record({"path": "all.bin", "range": [9, 9999]})),
    )
    index = load_index(path)
    assert [(f.height, f.width) for f in index.images(0)] == [(6, 5)]
    assert "all.bin ends too early" in index.problems[1]
    reader = SampleReader()
    record, members = reader.sample(path, 0)
    assert reader.media(record, members, tmp_path) == ([picture(6, 5)], [])


def test_reader_keeps_few_files_open(tmp_path):
    reader = ByteReader()
    for n in range(80):
        (tmp_path / str(n)).write_bytes(bytes([n]) * 3)
        assert reader.read(tmp_path / str(n), 1, 2) == bytes([n]) * 2
    assert len(reader._files) == 64
    assert reader.read(tmp_path / "0", 0, 1) == b"\0"
    reader.close()
    assert not reader._files
    with pytest.raises(ValueError, match="cannot read .*gone: No such file"):
        reader.read(tmp_path / "gone", 0, 1)


def test_frame_lists_need_one_size(tmp_path):
    record = json.dumps(
        {
            "v": 1,
            "messages": [{"role": "assistant", "content": "<video>"}],
            "videos": [{"frames": ["0.png", "1.png"], "rate": 2}],
        }
    ).encode()
    path = write(
        tmp_path / "x.tar",
        ("a.json", record),
        ("a.0.png", picture(6, 5)),
        ("a.1.png", picture(6, 5)),
        ("b.json", record),
        ("b.0.png", picture(6, 5)),
        ("b.1.png", picture(5, 6)),
    )
    index = load_index(path)
    facts = index.videos(0)[0]
    assert (facts.height, facts.width, facts.frames, facts.rate, facts.duration) == (6, 5, 2, 2, 1)
    assert "must have one size, found 6 x 5, 5 x 6 pixels" in index.problems[1]


@settings(max_examples=60)
@given(data=st.data())
def test_a_tar_with_any_bytes_changed_is_read_or_refused_by_name(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = write(
        folder / "x.tar", ("a.json", image_record("0.png")), ("a.0.png", picture(6, 5)), ("b.json", text_record())
    )
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        index = load_index(path)
    except ShardError as error:
        where = str(error)
    else:
        where = "x.tar"
        assert len(index) <= 3
        assert set(index.problems) <= set(range(len(index)))
    assert "x.tar" in where


def test_arrays_of_an_empty_shard(tmp_path):
    index = load_index(write(tmp_path / "x.tar"))
    assert len(index) == 0
    assert index.offsets.dtype == np.int64
    assert not list(group_members(tmp_path / "x.tar", iter(())))


def test_tars_laid_one_behind_the_other_are_refused(tmp_path):
    """Tar readers stop at the first end marker, and would silently miss the second half."""
    shard = tmp_path / "a.tar"
    with TarWriter(shard) as tar:
        tar.add("a.json", b"{}")
    one = shard.read_bytes()
    shard.write_bytes(one + bytes(20 * 512))  # the padding that tar writes
    assert [member.name for member in walk_tar(shard)] == ["a.json"]
    shard.write_bytes(one + one)
    with pytest.raises(ShardError, match=r"a.tar: goes on after its end-of-archive block at byte 1024: tars laid one"):
        list(walk_tar(shard))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"json": (1 << 26) + 1}, "json has 67,108,865 bytes; at most 67,108,864 of a record are read"),
        ({"json": 2, "mp4": (1 << 32) - 1}, "its members have 4,294,967,297 bytes; at most 4,294,967,296 of a sample"),
    ],
)
def test_a_sample_that_is_too_large_for_memory_is_bad_and_not_read(tmp_path, sizes, reason):
    shard = tmp_path / "a.tar"
    with shard.open("wb") as file:
        for name, size in sizes.items():
            info = tarfile.TarInfo(f"0.{name}")
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-size // 512) * 512, os.SEEK_CUR)  # a hole, which takes no room on the disk
        file.write(bytes(1024))
    assert load_index(shard).problems[0].startswith(reason)
    with pytest.raises(ValueError, match=reason):
        _look_at_sample(shard, next(group_members(shard, walk_tar(shard))), ByteReader(), OURS)

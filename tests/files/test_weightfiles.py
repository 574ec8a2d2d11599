"""Weight files and their index: damaged, missing or contradictory files are named before any weight is read."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.files.basefiles import open_base, weight_files
from finetune.files.layouts import LAYOUT_KEY
from finetune.files.tensorfile import file_size, read_header, read_tensor, reserve
from finetune.files.tiny import TinyModel, write_tiny
from finetune.files.writer import INDEX

NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sharded"
    write_tiny(folder, TinyModel(shard_bytes=300_000))
    return folder


@pytest.fixture
def sharded(base, tmp_path) -> Path:
    """Return a copy of a folder with several files and an index, to be damaged."""
    return shutil.copytree(base, tmp_path / "sharded")


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def damage(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = first_file(folder)
    file.write_bytes(change(file.read_bytes()))


def reheaded(content: bytes, change: Callable[[dict], None]) -> bytes:
    """Return the file with another header of any length, and the same data."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


DAMAGES = [
    (lambda c: c[:-1], r"its header announces \d+: it was cut off; fetch it again"),
    (lambda c: c + b"x", r"its header announces \d+: it was overwritten; fetch it again"),
    (lambda c: c[:4], r"is not a complete safetensors file: it has 4 bytes"),
    (lambda c: c[:20], r"is not a complete safetensors file: it has 20 bytes and announces a header of \d+"),
    (lambda c: b"version https://git-lfs.github.com/spec/v1", r"is not a complete safetensors file"),
    (lambda c: c[:8] + b"#" + c[9:], r"has a damaged safetensors header \(Expecting value"),
    (lambda c: c[:9] + b"\xff" + c[10:], r"has a damaged safetensors header"),
    (lambda c: reheaded(c, lambda h: first(h).pop("dtype")), r"damaged safetensors header: '.*' is described by"),
    (lambda c: reheaded(c, lambda h: first(h).update(dtype="F3")), r"damaged safetensors header: '.*' is described by"),
    (lambda c: reheaded(c, lambda h: first(h).update(shape=[2])), r"of F32 \[2\] needs 8 bytes, but its offsets give"),
    (lambda c: reheaded(c, lambda h: first(h).update(shape=[-2, -4])), r"header: '.*' is described by .*\[-2, -4\]"),
    (lambda c: reheaded(c, lambda h: first(h).update(shape=[8.0, 2])), r"header: '.*' is described by .*\[8.0, 2\]"),
    (lambda c: reheaded(c, lambda h: first(h).update(data_offsets=[False, 8])), r"header: '.*' is described by"),
    (lambda c: struct.pack("<Q", 200_000) + b"[" * 200_000, r"damaged safetensors header \(maximum recursion depth"),
    (lambda c: struct.pack("<Q", 8) + b"[1, 2]  ", r"damaged safetensors header \(metadata must map to strings"),
    (lambda c: reheaded(c, lambda h: h.update(__metadata__=[1])), r"header \(metadata must map to strings"),
    (
        lambda c: reheaded(c, lambda h: h.pop(next(n for n in h if n[0] == "m"))),
        r"overlaps another tensor or leaves a gap",
    ),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_a_damaged_file_is_named(sharded, change, message):
    damage(sharded, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_base(sharded)
    assert str(first_file(sharded)) in str(caught.value)


def test_every_damaged_file_is_named_at_once(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"(?s){files[0].name}.*{files[1].name}"):
        weight_files(sharded)


def test_a_file_cut_off_while_it_is_read_is_named(sharded):
    files = open_base(sharded)
    stored = files.stored["model.language_model.embed_tokens.weight"]
    stored.file.write_bytes(stored.file.read_bytes()[: stored.begin + 8])
    with pytest.raises(ValueError, match=r"ends inside model.language_model.embed_tokens.weight: it was cut off while"):
        files.read("model.language_model.embed_tokens.weight")


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_index_and_files_must_agree(sharded):
    change_index(sharded, lambda mapped: mapped.pop(NORM))
    with pytest.raises(ValueError, match=rf"{INDEX} does not say that model-.* holds {NORM}"):
        open_base(sharded)
    change_index(sharded, lambda mapped: mapped.update({NORM: first_file(sharded).name}))
    with pytest.raises(
        ValueError, match=rf"model-00001-of-.* lacks {NORM}, which should be there according to {INDEX}"
    ):
        open_base(sharded)


def test_a_missing_file_is_named(sharded):
    first_file(sharded).unlink()
    with pytest.raises(ValueError, match=rf"{INDEX} names weight files that are missing: model-00001-of"):
        open_base(sharded)


def test_a_file_that_the_index_does_not_name_is_not_ignored(sharded):
    shutil.copy(first_file(sharded), sharded / "model-00009-of-00009.safetensors")
    with pytest.raises(ValueError, match=rf"holds model-00009-of-00009.safetensors, which {INDEX} does not name"):
        open_base(sharded)


def test_a_key_in_two_files_is_named(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match=r"model-00002-of-.* and model-00001-of-.* both hold .*embed_tokens"):
        open_base(sharded)


def test_files_of_two_layouts_are_refused(sharded):
    save_file(load_file(first_file(sharded)), first_file(sharded), metadata={LAYOUT_KEY: "memory"})
    with pytest.raises(ValueError, match=r"name different layouts: model-00001-of-\S+ memory, model-00002-of-\S+ hub"):
        open_base(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"has no weight_map of file names; fetch it again"),
        ("{", r"is not valid JSON"),
        ("[" * 100_000, r"is not valid JSON: maximum recursion depth"),
        ('{"weight_map": {}}', r"no weight_map"),
        ('{"weight_map": {"lm_head.weight": 5}}', r"no weight_map of file names"),
    ],
)
def test_a_broken_index_is_named(sharded, content, message):
    (sharded / INDEX).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_base(sharded)


def test_files_without_index_or_no_files_at_all(sharded, tmp_path):
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"holds weight files \(model-00001.*\) but no {INDEX}; it was copied or"):
        open_base(sharded)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"empty holds no weights: neither model.safetensors nor {INDEX}\. Fetch"):
        open_base(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"It holds pytorch_model.bin, but only safetensors files can be read"):
        open_base(tmp_path / "empty")


def test_headers_of_the_library_are_read_like_ours(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2).bfloat16(), "c": torch.zeros(4, 0)}
    save_file(tensors, tmp_path / "lib.safetensors", metadata={"k": "v"})
    stored, metadata = read_header(tmp_path / "lib.safetensors")
    assert metadata == {"k": "v"}
    assert {name: entry.shape for name, entry in stored.items()} == {"a": (2,), "b": (3, 5), "c": (4, 0)}


KINDS = {"b": ("F32", (3, 5)), "a": ("BF16", (2,))}


def test_the_library_reads_files_written_in_any_order_and_in_short_calls(tmp_path, monkeypatch):
    b, a = torch.randn(3, 5), torch.randn(2).bfloat16()
    path = tmp_path / "ours.safetensors"
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: preadv(handle, [buffers[0][:7]], at))
    with reserve(path, KINDS, {"k": "v"}) as file:
        assert path.stat().st_size == file_size(KINDS, {"k": "v"}) == len(file.header) + 64
        file.put("a", a)
        file.put("b", b[1:], 20)
        file.put("b", b[:1])
    loaded = load_file(path)
    assert torch.equal(loaded["b"], b)
    assert torch.equal(loaded["a"], a)
    stored, metadata = read_header(path)
    assert metadata == {"k": "v"}
    assert torch.equal(read_tensor(stored["b"]), b)
    assert torch.equal(read_tensor(stored["b"], range(1, 3)), b[1:])


def test_a_file_takes_each_byte_exactly_once(tmp_path):
    for values, begin, message in (
        (torch.zeros(3, 5), 4, "b: 4 . 60 of 60 bytes"),
        (torch.zeros(1, 5), -20, "b: -20"),
        (torch.zeros(3, 5).double(), 0, "b has dtype torch.float64"),
        (torch.zeros(2, 5), 0, "24 bytes of .* were not written"),
    ):
        with pytest.raises(AssertionError, match=message), reserve(tmp_path / "x", KINDS, {}) as file:
            file.put("b", values, begin)

"""The model writer: the hub's layout on disk, tensors in any order, and no half-finished folders."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from finetune.architecture.shapes import is_expert_stack, parameter_shapes
from finetune.files.atomic import REPLACED, UNFINISHED, is_marked, whole_folder
from finetune.files.hubconfig import read_family
from finetune.files.jsonblock import load_json
from finetune.files.tiny import TinyModel, random_weights, write_tiny
from finetune.files.writer import INDEX, links_outside, model_writer, plan_shards, side_files_of, write_model

GATE_UP = "model.language_model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "moe"
    write_tiny(folder)
    return folder


def target(folder: Path, base: Path, **changes) -> dict:
    """Return the writer's keyword arguments for a model like `base`."""
    family = read_family(base)
    given = {
        "folder": folder,
        "shapes": parameter_shapes(family),
        "dtypes": "F32",
        "config": load_json(base / "config.json"),
        "side_files": side_files_of(base),
    }
    return given | changes


def weights(base: Path, seed: int = 0, dtype: str = "float32"):
    return random_weights(parameter_shapes(read_family(base)), dtype=dtype, seed=seed)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ids = torch.tensor([[5, 600, 7, 300, 41, 2, 2, 901]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def nothing_is_left(folder: Path) -> bool:
    return not folder.exists() and not list(folder.parent.glob("*.partial"))


def test_a_model_that_transformers_loads_and_we_write_gives_equal_logits(base, tmp_path):
    loaded = AutoModelForImageTextToText.from_pretrained(base)
    loaded.save_pretrained(tmp_path / "v5")  # layout of memory, config in transformers 5's spelling
    config = load_json(tmp_path / "v5" / "config.json")
    assert "rope_parameters" in config["text_config"]
    written = write_model(tensors=loaded.named_parameters(), **target(tmp_path / "ours", base, config=config))
    assert torch.equal(logits(tmp_path / "ours"), logits(base))
    assert (written.tensors, written.files) == (111, 1)
    assert written.weight_bytes == sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    # Keys and shapes are as transformers 4, vLLM and sglang expect: they transpose without looking at shapes.
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored[GATE_UP].shape == (8, 48, 80)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in load_file(base / "model.safetensors").items()
    }
    config = load_json(tmp_path / "ours" / "config.json")
    for key, value in load_json(base / "config.json")["text_config"].items():
        assert config["text_config"][key] == value
    assert not {"rope_parameters", "num_local_experts"} & config["text_config"].keys()
    assert config["vision_config"]["model_type"] == "qwen3_vl_moe"


def test_every_other_file_of_the_base_is_copied(base, tmp_path):
    extended = tmp_path / "extended"
    extended.mkdir()
    for name, content in side_files_of(base).items():
        (extended / name).write_bytes(content.read_bytes())
    (extended / "README.md").write_text("a card")
    (extended / "extra").mkdir()
    (extended / "extra" / "notes.txt").write_text("nested")
    for unwanted in (".cache/huggingface/x", "pytorch_model.bin", "model-00009-of-00009.safetensors", INDEX, "a.gguf"):
        (extended / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (extended / unwanted).write_text("x")
    write_model(tensors=weights(base), **target(tmp_path / "out", base, side_files=side_files_of(extended)))
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {path.name for path in base.iterdir()} | {"README.md", "extra/notes.txt"}
    assert names == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert (tmp_path / "out" / "chat_template.json").read_bytes() == (base / "chat_template.json").read_bytes()


def test_rows_in_any_order_give_the_same_bytes_as_whole_tensors(base, tmp_path):
    with model_writer(**target(tmp_path / "rows", base)) as writer:
        for name, tensor in reversed(list(weights(base))):
            if is_expert_stack(name):  # as three expert-parallel ranks would send them
                writer.write(name, tensor[6:], first_row=6)
                writer.write(name, tensor[:1])
                writer.write(name, tensor[1:6], first_row=1)
            else:
                writer.write(name, tensor)
    assert (tmp_path / "rows" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_shards_and_index(base, tmp_path):
    write_model(tensors=weights(base), **target(tmp_path / "out", base, shard_bytes=150_000))
    index = load_json(tmp_path / "out" / INDEX)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{at:05d}-of-{len(files):05d}.safetensors" for at in range(1, len(files) + 1)]
    assert len(files) > 5
    whole = load_file(base / "model.safetensors")
    stored = {}
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 150_000 or len(tensors) == 1
        stored |= tensors
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert torch.equal(logits(tmp_path / "out"), logits(base))


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own():
    tensors = {"a": ("F32", (2, 4)), "b": ("F32", (100, 4)), "c": ("F32", (1, 4))}
    plan = plan_shards(tensors, shard_bytes=100)
    assert [list(group) for group in plan.values()] == [["a"], ["b"], ["c"]]
    assert list(plan)[1] == "model-00002-of-00003.safetensors"


def test_types_may_differ_by_tensor(base, tmp_path):
    shapes = parameter_shapes(read_family(base))
    dtypes = {name: "BF16" if is_expert_stack(name) else "F32" for name in shapes}
    given = ((name, tensor.bfloat16() if is_expert_stack(name) else tensor) for name, tensor in weights(base))
    write_model(tensors=given, **target(tmp_path / "out", base, dtypes=dtypes))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored[GATE_UP].dtype == torch.bfloat16
    assert stored["lm_head.weight"].dtype == torch.float32


def without(items, *names):
    return (item for item in items if item[0] not in names)


BAD_STREAMS = [
    (lambda b: without(weights(b), "lm_head.weight"), r"missing or incomplete tensors \(1 of 111\): lm_head.weight"),
    (lambda b: [*weights(b)][3:], r"missing or incomplete tensors \(3 of 111\)"),
    (lambda b: [*weights(b), ("lm_head.weight", torch.zeros(1024, 48))], r"lm_head.weight was written twice"),
    (lambda b: [("lm_head.bias", torch.zeros(3))], r"lm_head.bias is not a parameter of this model"),
    (
        lambda b: [("lm_head.weight", torch.zeros(48, 1024))],
        r"must be F32 \[1024, 48\], got F32 \[48, 1024\]",
    ),
    (lambda b: weights(b, dtype="bfloat16"), r"must be F32 \[1024, 48\], got BF16"),
    (lambda b: [(GATE_UP, torch.zeros(8, 48, 80))], r"must be F32 \[8, 80, 48\], got F32 \[8, 48, 80\]"),
]


@pytest.mark.parametrize(("stream", "message"), BAD_STREAMS)
def test_a_wrong_or_incomplete_stream_leaves_nothing(base, tmp_path, stream, message):
    with pytest.raises(ValueError, match=message):
        write_model(tensors=stream(base), **target(tmp_path / "out", base))
    assert nothing_is_left(tmp_path / "out")


def write_parts(parts, **given) -> None:
    with model_writer(**given) as writer:
        for name, tensor, first_row in parts:
            writer.write(name, tensor, first_row=first_row)


def test_missing_and_repeated_experts_are_named(base, tmp_path):
    given = target(tmp_path / "out", base)
    gap = [(name, tensor[:2] if name == GATE_UP else tensor, 0) for name, tensor in weights(base)]
    with pytest.raises(ValueError, match=r"gate_up_proj \(experts 2-5, 7\)"):
        write_parts([*gap, (GATE_UP, torch.zeros(1, 80, 48), 6)], **given)
    with pytest.raises(ValueError, match=r"written twice \(experts \[1\]\)"):
        write_parts([(GATE_UP, torch.zeros(2, 80, 48), 0), (GATE_UP, torch.zeros(2, 80, 48), 1)], **given)
    with pytest.raises(ValueError, match=r"\[2, 80, 48\] starting at expert 7"):
        write_parts([(GATE_UP, torch.zeros(2, 80, 48), 7)], **given)
    assert nothing_is_left(tmp_path / "out")


def test_an_error_of_the_stream_passes_through_and_leaves_nothing(base, tmp_path):
    def failing():
        yield next(iter(weights(base)))
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_model(tensors=failing(), **target(tmp_path / "out", base))
    assert nothing_is_left(tmp_path / "out")


def test_an_occupied_destination_is_kept_and_an_empty_one_taken(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="out exists and is not empty; remove it, or give another folder"):
        write_model(tensors=weights(base), **target(tmp_path / "out", base))
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.partial").mkdir()  # left by a killed run
    (tmp_path / "empty.partial" / "config.json").write_text("{}")
    (tmp_path / "empty.partial" / UNFINISHED).write_text("")
    write_model(tensors=weights(base), **target(tmp_path / "empty", base))
    assert torch.equal(logits(tmp_path / "empty"), logits(base))
    assert not (tmp_path / "empty.partial").exists()
    assert not (tmp_path / "empty" / UNFINISHED).exists()


def test_folders_of_the_user_are_never_emptied(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("keep")
    (tmp_path / "out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(
        ValueError, match=r"out.partial is a symbolic link, but .*out is written in a folder of that name"
    ):
        write_tiny(tmp_path / "out", TinyModel())
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").write_text("a file")
    with pytest.raises(ValueError, match=r"out.partial is a file, but .* Remove or rename it, or give another folder"):
        write_tiny(tmp_path / "out", TinyModel())
    (tmp_path / "out.partial").unlink()
    (tmp_path / "precious").rename(tmp_path / "out.partial")
    with pytest.raises(
        ValueError, match=r"out.partial holds files that moetune did not put there \(a\), but .* Move it away"
    ):
        write_tiny(tmp_path / "out", TinyModel())
    assert (tmp_path / "out.partial" / "a").read_text() == "keep"
    assert not (tmp_path / "out").exists()


def replaced(folder: Path, content: str | None) -> None:
    with whole_folder(folder, replace=True) as beside:
        assert not folder.exists() or is_marked(folder, REPLACED)
        (beside / "half").write_text("")
        (beside / "ours").write_text(content)
        (beside / "half").unlink()


def test_an_earlier_folder_stays_until_the_new_one_is_complete(tmp_path):
    out = tmp_path / "out"
    replaced(out, "first")
    (out / "mine.txt").write_text("precious")
    with pytest.raises(TypeError, match="must be str"):
        replaced(out, None)  # fails in the middle
    assert (out / "ours").read_text() == "first"
    replaced(out, "second")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"ours": "second", "mine.txt": "precious"}
    shutil.copytree(out, tmp_path / "out.replaced")
    with pytest.raises(ValueError, match=r"out.replaced is in the way of replacing .*out, and moetune did not make it"):
        replaced(out, "third")
    for moment, gone in (("before the new one had its name", True), ("before all was moved", False)):  # killed then
        (tmp_path / "out.replaced" / REPLACED).write_text("")
        (tmp_path / "out.replaced" / "more.txt").write_text(moment)
        if gone:
            shutil.rmtree(out)
        replaced(out, moment)
        assert (out / "ours").read_text() == moment
        assert (out / "mine.txt").read_text() == "precious"
        assert (out / "more.txt").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        shutil.copytree(out, tmp_path / "out.replaced")


def test_files_outside_the_base_are_not_copied(base, tmp_path):
    """But a cache of the hub, whose snapshot links to its blobs, is a normal base."""
    (tmp_path / "id_rsa").write_text("secret")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "NOTICE.txt").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "base" / "COPY.txt").symlink_to("chat_template.json")
    names = side_files_of(tmp_path / "base").keys()
    assert names == side_files_of(base).keys() | {"COPY.txt"}
    assert links_outside(tmp_path / "base") == ["NOTICE.txt"]
    shutil.copytree(base, tmp_path / "hub" / "blobs")
    (tmp_path / "hub" / "snapshots" / "1").mkdir(parents=True)
    for path in base.iterdir():
        (tmp_path / "hub" / "snapshots" / "1" / path.name).symlink_to(f"../../blobs/{path.name}")
    assert side_files_of(tmp_path / "hub" / "snapshots" / "1").keys() == side_files_of(base).keys()


def test_a_link_is_followed_to_its_target(base, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "to empty").symlink_to(tmp_path / "disk" / "empty")
    (tmp_path / "to nothing").symlink_to(tmp_path / "disk" / "nothing")
    (tmp_path / "disk" / "empty").mkdir()
    for name in ("empty", "nothing"):
        write_model(tensors=weights(base), **target(tmp_path / f"to {name}", base))
        assert torch.equal(logits(tmp_path / "disk" / name), logits(base))
        assert (tmp_path / f"to {name}").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_model(tensors=weights(base), **target(Path(), base))
    monkeypatch.chdir(tmp_path)  # the current folder was replaced, and torch may import from there
    assert torch.equal(logits(tmp_path / "here"), logits(base))


def test_during_writing_nothing_looks_finished(base, tmp_path):
    def watching():
        for name, tensor in weights(base):
            assert not (tmp_path / "out").exists()
            assert not list(tmp_path.rglob("config.json"))
            yield name, tensor

    write_model(tensors=watching(), **target(tmp_path / "out", base))
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_an_error_message_of_its_own(base, tmp_path, monkeypatch, code):
    def full(handle, start, size):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"is full, or its quota is used up; the unfinished out was removed") as caught:
        write_model(tensors=weights(base), **target(tmp_path / "out", base))
    assert caught.value.errno == code
    assert nothing_is_left(tmp_path / "out")


def test_other_disk_errors_are_passed_on(base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        write_model(tensors=weights(base), **target(tmp_path / "file" / "out", base))


def test_a_really_full_disk_fails_before_the_first_tensor(base, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs permissions that this user does not have")
    try:
        handed_over = []
        with pytest.raises(OSError, match="is full"):
            write_model(
                tensors=((handed_over.append(n), (n, t))[1] for n, t in weights(base)), **target(small / "out", base)
            )
        assert handed_over == []
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


MEMORY = """
import sys, pathlib, torch
from finetune.files.writer import write_model
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
shapes = {f"model.language_model.layers.{n}.mlp.experts.gate_up_proj": (16, 640, 512) for n in range(16)}
def stream():
    for name, shape in shapes.items():
        yield name, torch.full(shape, 0.5)
config = {"model_type": "qwen3_vl_moe", "text_config": {}, "vision_config": {}}
def run(names, folder):
    write_model(pathlib.Path(folder), ((n, torch.full(shapes[n], 0.5)) for n in names),
                shapes={n: shapes[n] for n in names}, dtypes="F32", config=config, side_files={})
run(list(shapes)[:1], sys.argv[1] + "/warm")
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak()
run(list(shapes), sys.argv[1] + "/out")
print(peak() - before)
"""


def test_memory_is_one_tensor_whatever_the_model(tmp_path):
    """Write 16 tensors of 21 MB, 335 MB in total, with memory for one tensor, one expert and the allocator's cache."""
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 16 * 640 * 512 * 4
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 335_000_000


def test_config_is_written_sorted_like_the_hubs(base):
    text = (base / "config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_two_processes_do_not_write_one_folder(tmp_path):
    """Otherwise the first to end would give the finished name to the other's half-written files."""
    with whole_folder(tmp_path / "out") as beside:
        (beside / "config.json").write_text("{}")
        with (
            pytest.raises(ValueError, match="out is being written by another process; wait for it, or give"),
            whole_folder(tmp_path / "out"),
        ):
            raise AssertionError("both were let in")
        assert (beside / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

"""Base checkpoints on disk: every layout, incomplete or foreign ones, and reading of single tensors."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from base_variants import Tensors, folder_with, hub, is_stack, per_expert, weights
from safetensors.torch import save_file

from finetune.architecture.families import family
from finetune.architecture.shapes import parameter_shapes
from finetune.files.basefiles import BaseFiles, open_base
from finetune.files.layouts import LAYOUT_KEY, recognise
from finetune.files.tensorfile import read_header
from finetune.files.tiny import TinyModel, write_tiny

EXPERTS = "model.language_model.layers.{}.mlp.experts"
GATE_UP = EXPERTS.format(1) + ".gate_up_proj"
DOWN = EXPERTS.format(1) + ".down_proj"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("bases") / name for name in ("moe", "sharded", "tied")}
    write_tiny(made["moe"])
    write_tiny(made["sharded"], TinyModel(shard_bytes=300_000))
    write_tiny(made["tied"], TinyModel(experts=None, tied=True))
    return made


def reads_all(files: BaseFiles, expected: Tensors) -> bool:
    return files.shapes.keys() == expected.keys() and all(torch.equal(files.read(n), t) for n, t in expected.items())


def test_every_layout_gives_the_same_tensors(bases, tmp_path):
    tensors = weights(bases["moe"])
    assert reads_all(open_base(bases["moe"]), tensors)
    for layout, stored in {"hub": hub(tensors), "memory": tensors, "per_expert": per_expert(tensors)}.items():
        folder = folder_with(
            tmp_path / layout if (tmp_path / layout).mkdir() is None else tmp_path, bases["moe"], stored
        )
        files = open_base(folder)
        assert files.layout == layout
        assert reads_all(files, tensors)
        some = files.read(GATE_UP, range(3, 6))
        assert torch.equal(some, tensors[GATE_UP][3:6])
        assert torch.equal(files.read(DOWN, range(7, 8)), tensors[DOWN][7:])
        assert torch.equal(files.out_feature(GATE_UP, 5, 61), tensors[GATE_UP][5, 61])
        assert files.size(GATE_UP, range(3)) == tensors[GATE_UP][:3].nbytes
        assert sum(files.size(name) for name in files.shapes) == sum(t.nbytes for t in tensors.values())
        assert set(files.dtypes.values()) == {"F32"}


def test_several_files_and_a_tied_head(bases):
    assert reads_all(open_base(bases["sharded"]), weights(bases["sharded"]))
    tied = open_base(bases["tied"])
    assert HEAD not in tied.shapes
    assert reads_all(tied, weights(bases["tied"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept_bit_for_bit(bases, tmp_path, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in hub(weights(bases["moe"])).items()}
    files = open_base(folder_with(tmp_path, bases["moe"], stored))
    assert torch.equal(files.read(GATE_UP), weights(bases["moe"])[GATE_UP].to(dtype))


def test_reading_takes_one_stack_and_one_matrix(bases, tmp_path):
    """Measure memory while a hub stack of 63 MB is read: the result and one transposed expert of 4 MB."""
    code = (
        "import sys, pathlib, torch\n"
        "from finetune.files.basefiles import open_base\n"
        "from finetune.files.tiny import *\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "write_tiny(folder, TinyModel(layers=1, experts=16, hidden=1024, expert_hidden=480))\n"
        "files = open_base(folder)\n"
        "name = 'model.language_model.layers.0.mlp.experts.gate_up_proj'\n"
        "files.read(name, range(1))\n"
        "def peak():\n"
        "    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "before = peak()\n"
        "held = files.read(name)\n"
        "print(peak() - before, held.nbytes, held[0].nbytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "big"], capture_output=True, text=True, check=True)
    grown, stack, matrix = map(int, done.stdout.split())
    assert stack == 16 * 960 * 1024 * 4
    assert grown <= stack + 3 * matrix


def test_metadata_decides_before_shapes_and_the_users_setting_before_both(bases, tmp_path):
    tensors = weights(bases["moe"])
    files = open_base(folder_with(tmp_path / "a", bases["moe"], tensors, {LAYOUT_KEY: "memory"}))
    assert files.layout == "memory"
    with pytest.raises(ValueError, match=r"with another shape.*\n.*cause: the experts are stored in the other fused"):
        open_base(folder_with(tmp_path / "b", bases["moe"], tensors, {LAYOUT_KEY: "hub"}))
    with pytest.raises(ValueError, match="experts are stored in the other fused layout; leave model.layout at auto"):
        open_base(bases["moe"], layout="memory")
    assert open_base(bases["moe"], layout="hub").layout == "hub"


def test_with_equal_shapes_the_user_must_set_the_layout(tmp_path):
    """Transformers 5 itself silently loads such a hub file without transposing it if D == 2F."""
    entry = parameter_shapes(family("tiny-moe"))
    square = {name: (8, 48, 48) if name.endswith("gate_up_proj") else shape for name, shape in entry.items()}
    with pytest.raises(ValueError, match=r"has the shape \[8, 48, 48\] both in the hub's layout and in .* recognised"):
        recognise(square, square, metadata=None)
    assert recognise(square, square, metadata="hub") == "hub"
    assert recognise(square, square, metadata=None, setting="memory") == "memory"
    mixed = {name: (8, 48, 40) if name == DOWN else shape for name, shape in hub_shapes(entry).items()}
    with pytest.raises(ValueError, match=r"the files mix two layouts: .*layers.0.*gate_up_proj.*layers.1.*down_proj"):
        recognise(mixed, entry, metadata=None)


def hub_shapes(entry):
    return {name: (s[0], s[2], s[1]) if is_stack(name) else s for name, s in entry.items()}


def test_unknown_layouts_are_refused(bases, tmp_path):
    with pytest.raises(ValueError, match="model.layout must be one of auto, hub, memory, per_expert, got 'v5'"):
        open_base(bases["moe"], layout="v5")
    folder = folder_with(tmp_path, bases["moe"], weights(bases["moe"]), {LAYOUT_KEY: "spiral"})
    with pytest.raises(ValueError, match="in their metadata must be one of hub, memory, per_expert, got 'spiral'"):
        open_base(folder)


def rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


ROW = torch.zeros(48)
FOREIGN = [
    (without(HEAD), r"missing keys \(1 of 111\): lm_head.weight\n.*is tied .* config.json sets tie_word_embeddings to"),
    (
        without("visual"),
        r"missing keys .*: model.visual.*\n.*weights of a text model, without a vision tower",
    ),
    (rename("model.", "module.model."), r"unexpected keys .*\n.*have the prefix 'module.' of a training wrapper"),
    (rename("model.", ""), r"the keys lack the prefix 'model.'"),
    (rename("model.language_model.", "model."), r"the weights of a text model \(model.layers.\*"),
    (rename("experts.gate_up_proj", "experts.w13"), r"stored under the names of another layout"),
    (lambda t: t | {"x.lora_A": ROW}, r"unexpected keys \(1\): x.lora_A\n.*an adapter's weights, not a model's"),
    (lambda t: t | {f"{EXPERTS.format(7)}.x": ROW}, r"more layers than num_hidden_layers in config.json, by 1"),
    (
        lambda t: t | {HEAD: torch.zeros(1030, 48)},
        r"is \[1030, 48\], not \[1024, 48\]\n.*was resized",
    ),
    (
        lambda t: {n: x[..., :1].contiguous() for n, x in t.items()},
        r"belongs to a model of another size than the weights",
    ),
    (
        lambda t: t | {HEAD: t[HEAD].to(torch.int8)},
        r"other than F32, BF16, F16 \(1\): lm_head.weight is I8\n.*quantised",
    ),
]


@pytest.mark.parametrize(("change", "message"), FOREIGN)
def test_a_foreign_checkpoint_is_refused_with_the_likely_cause(bases, tmp_path, change, message):
    folder = folder_with(tmp_path, bases["moe"], change(hub(weights(bases["moe"]))))
    with pytest.raises(
        ValueError, match=rf"(?s)made does not hold the model that its config.json describes.*{message}"
    ):
        open_base(folder)


def test_a_separate_head_with_a_tied_embedding_is_refused(bases, tmp_path):
    tensors = weights(bases["tied"]) | {HEAD: torch.zeros(1024, 48)}
    with pytest.raises(ValueError, match=r"config.json ties the head to the embedding .* have a separate head"):
        open_base(folder_with(tmp_path, bases["tied"], tensors))


def test_experts_of_one_stack_in_two_types_are_refused(bases, tmp_path):
    tensors = per_expert(weights(bases["moe"]))
    tensors[EXPERTS.format(2) + ".3.up_proj.weight"] = tensors[EXPERTS.format(2) + ".3.up_proj.weight"].bfloat16()
    with pytest.raises(ValueError, match=r"expert stacks of several types \(1\): .*layers.2.*gate_up \(BF16, F32\)"):
        open_base(folder_with(tmp_path, bases["moe"], tensors))


def test_reading_a_quantised_tensor_is_refused(tmp_path):
    """Reading refuses it even if the keys were not checked before."""
    save_file({"x": torch.zeros(4, 3, dtype=torch.int8)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")[0]
    files = BaseFiles(folder=tmp_path, layout="hub", stored=stored, shapes={"x": (4, 3)})
    with pytest.raises(ValueError, match=r"x is stored as I8, but weights must be one of F32, BF16, F16"):
        files.read("x")

"""Bases in fp8: the arithmetic and both layouts against numpy, slices across blocks, and damaged folders."""

import json
import shutil
from pathlib import Path

import fp8_files as fp8
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.files.basefiles import BaseFiles, open_base
from finetune.files.fingerprint import fingerprint
from finetune.files.fp8 import dequantise, quantise, require_sound_scales
from finetune.files.tiny import TinyModel, write_tiny
from launchers.cli import main

SIZES = {"hidden": 200, "expert_hidden": 136, "experts": 3, "layers": 2, "heads": 5, "head_dim": 32, "kv_heads": 1}
LAYER = "model.language_model.layers.1."
Q, STACK = LAYER + "self_attn.q_proj.weight", LAYER + "mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main(["tiny", str(folder / "plain"), *words]) == 0
    assert main(["tiny", str(folder / "stacked"), *words, "--fp8"]) == 0
    assert main(["tiny", str(folder / "per-expert"), *words, "--fp8", "per-expert"]) == 0
    return folder


def test_the_arithmetic_is_that_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 200, generator=generator) * torch.logspace(-9, 9, 200)
    values[:, 128:] = torch.arange(300 * 72).view(300, 72).remainder(1000) - 500  # many ties
    values[128:256, :128] = 0.0
    values[3, 5] = -0.0
    codes, scales = quantise(values)
    expected = fp8.quantised(values.numpy())
    assert np.array_equal(codes.view(torch.uint8).numpy(), expected[0])
    assert np.array_equal(scales.numpy(), expected[1])
    assert scales[1, 0] == 1, "a block of zeros"
    back = fp8.dequantised(*expected)
    assert np.array_equal(dequantise(codes, scales).numpy(), back)
    assert np.array_equal(dequantise(codes[130:290], scales[1:], 2).numpy(), back[130:290])
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert np.array_equal(dequantise(every[None], torch.ones(1, 2))[0].numpy(), fp8.VALUES, equal_nan=True)


@pytest.mark.parametrize("layout", ["stacked", "per-expert"])
def test_a_tiny_fp8_folder_holds_the_quantised_weights_of_the_plain_one(folders: Path, layout: str) -> None:
    plain, written = fp8.raw(folders / "plain"), fp8.raw(folders / layout)
    config = json.loads((folders / layout / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    kept = set(config["modules_to_not_convert"])
    assert {"lm_head", LAYER + "mlp.gate", "model.visual.blocks.0.attn.qkv", "model.visual.merger.linear_fc1"} <= kept
    codes = {name for name, array in written.items() if array.dtype == np.uint8}
    assert not any(name.removesuffix(".weight") in kept for name in codes)
    assert {f"{name}_scale_inv" for name in codes} == {name for name in written if name.endswith("_scale_inv")}
    half = SIZES["expert_hidden"]
    for name, array in plain.items():
        if name in written:
            parts = {name: array}
        else:
            kinds = ("down",) if name.endswith("down_proj") else ("gate", "up")
            stem = name.rpartition(".")[0]
            parts = {
                f"{stem}.{expert}.{kind}_proj.weight": matrix.T[at * half : (at + 1) * half]
                if len(kinds) > 1
                else matrix.T
                for expert, matrix in enumerate(array)
                for at, kind in enumerate(kinds)
            }
        for key, values in parts.items():
            if key in codes:
                expected = fp8.quantised(np.ascontiguousarray(values))
                assert np.array_equal(written[key], expected[0]), key
                assert np.array_equal(written[f"{key}_scale_inv"], expected[1]), key
            else:
                assert np.array_equal(written[key], values), key


@pytest.mark.parametrize("layout", ["stacked", "per-expert"])
def test_every_slice_is_read_with_its_own_scales(folders: Path, layout: str) -> None:
    files, expected = open_base(folders / layout), fp8.weights(fp8.raw(folders / layout))
    assert files.quantised == "fp8 (e4m3 in blocks of 128 x 128)"
    for rows in (range(160), range(100, 150), range(129, 131), range(127, 128)):
        assert np.array_equal(files.read(Q, rows).numpy(), expected[Q][rows.start : rows.stop])
    whole = np.stack([_expert(expected, STACK, expert) for expert in range(3)])
    assert files.read(STACK).dtype == torch.float32
    assert np.array_equal(files.read(STACK).numpy(), whole)
    assert np.array_equal(files.read(STACK, range(1, 3)).numpy(), whole[1:])
    for row in (0, 127, 130, 136, 271):
        assert np.array_equal(files.out_feature(STACK, 2, row).numpy(), whole[2, row])


def test_stacks_as_transformers_5_saves_them_are_read(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stacked", tmp_path / "memory")
    file = tmp_path / "memory" / "model.safetensors"
    tensors = {
        name: tensor.view(torch.uint8 if tensor.element_size() == 1 else tensor.dtype).transpose(-1, -2).contiguous()
        if ".experts." in name
        else tensor
        for name, tensor in load_file(file).items()
    }
    save_file({n: t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for n, t in tensors.items()}, file)
    files, stacked = open_base(tmp_path / "memory"), open_base(folders / "stacked")
    assert files.layout == "memory"
    for name in (STACK, STACK.replace("gate_up", "down")):
        assert torch.equal(files.read(name), stacked.read(name))
        assert torch.equal(files.out_feature(name, 1, 130), stacked.out_feature(name, 1, 130))
        pairs = zip(files.codes(name, 2), stacked.codes(name, 2), strict=True)
        assert all(torch.equal(first.float(), second.float()) for first, second in pairs)
    assert fingerprint(files) == fingerprint(stacked)


def _expert(stored: dict[str, np.ndarray], name: str, expert: int) -> np.ndarray:
    if name in stored:
        return stored[name][expert].T
    stem = name.rpartition(".")[0]
    return np.concatenate([stored[f"{stem}.{expert}.{kind}_proj.weight"] for kind in ("gate", "up")])


def test_a_read_takes_only_the_bytes_it_needs(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = open_base.__globals__["read_tensor"]

    def counted(stored, rows=None):
        tensor = real(stored, rows)
        taken.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr("finetune.files.basefiles.read_tensor", counted)
    files = open_base(folders / "stacked")
    for name, rows in ((Q, range(100, 150)), (Q, range(10)), (STACK, range(1, 2)), (STACK, None)):
        taken.clear()
        files.read(name, rows)
        assert sum(taken) == files.size(name, rows)
    assert files.size(Q, range(10)) == 10 * 200 + 2 * 4
    assert files.size(STACK, range(1, 2)) == 200 * 272 + 2 * 3 * 4
    assert files.row_bytes(Q) == 200 * 4


def test_the_fingerprint_is_that_of_the_dequantised_values(folders: Path, tmp_path: Path) -> None:
    files = open_base(folders / "stacked")
    shutil.copytree(folders / "plain", tmp_path / "same")
    values = fp8.weights(fp8.raw(folders / "stacked"))
    fp8.changed(tmp_path / "same", **{name: torch.from_numpy(array.copy()) for name, array in values.items()})
    assert fingerprint(files) == fingerprint(open_base(tmp_path / "same"))
    assert fingerprint(files) != fingerprint(open_base(folders / "plain"))
    exact = TinyModel(hidden=200, expert_hidden=128, experts=2, layers=1)  # gate and up do not share a block
    prints = []
    for layout in ("stacked", "per-expert"):
        write_tiny(tmp_path / layout, TinyModel(**{**exact.__dict__, "fp8": layout}))
        prints.append(fingerprint(open_base(tmp_path / layout)))
    assert prints[0] == prints[1]


def test_scales_in_bfloat16_are_read(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stacked", tmp_path / "base")
    key = f"{Q}_scale_inv"
    scales = torch.from_numpy(fp8.raw(tmp_path / "base")[key].copy()).bfloat16()
    fp8.changed(tmp_path / "base", **{key: scales})
    assert np.array_equal(open_base(tmp_path / "base").read(Q).numpy(), fp8.weights(fp8.raw(tmp_path / "base"))[Q])


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
@pytest.mark.parametrize("name", [Q, STACK])
def test_a_corrupted_scale_is_one_error_that_names_its_tensor(
    folders: Path, tmp_path: Path, name: str, value: float
) -> None:
    shutil.copytree(folders / "stacked", tmp_path / "base")
    key = f"{name}_scale_inv"
    scales = torch.from_numpy(fp8.raw(tmp_path / "base")[key].copy())
    scales.view(-1)[-1] = value
    fp8.changed(tmp_path / "base", **{key: scales})
    files = open_base(tmp_path / "base")
    for read in (lambda: files.read(name), lambda: require_sound_scales(files.scales.values())):
        with pytest.raises(ValueError, match=f"{key} holds the scale {value}; a scale must be a finite number above 0"):
            read()


def test_an_incomplete_fp8_folder_is_refused(folders: Path, tmp_path: Path) -> None:
    def opened(**tensors: torch.Tensor | None) -> BaseFiles:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        shutil.copytree(folders / "stacked", tmp_path / "base")
        fp8.changed(tmp_path / "base", **tensors)
        return open_base(tmp_path / "base")

    key, router = f"{Q}_scale_inv", LAYER + "mlp.gate.weight_scale_inv"
    with pytest.raises(ValueError, match=rf"fp8 tensors without scales \(1\): {key} missing"):
        opened(**{key: None})
    with pytest.raises(ValueError, match=rf"scales without an fp8 tensor \(1\): {router}"):
        opened(**{router: torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"not one float for each block \(1\): .* is F32 \[2, 3\] for \[160, 200\]"):
        opened(**{key: torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"one float for each block \(1\): .* is I32 \[2, 2\]"):
        opened(**{key: torch.ones(2, 2, dtype=torch.int32)})
    everything = {name: None for name in fp8.raw(folders / "stacked") if name.endswith("_scale_inv")}
    plain = fp8.weights(fp8.raw(folders / "stacked"))
    with pytest.raises(ValueError, match="config.json says that it is fp8 .*, but no tensor has the type F8_E4M3"):
        opened(**everything, **{name: torch.from_numpy(array.copy()) for name, array in plain.items()})


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"quant_method": "awq"}, "the base is quantised by awq .*which cannot be read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size is None; .* must be .128, 128."),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt is 'e5m2'; .* must be 'e4m3'"),
        (None, "the checkpoint is quantised, but its config.json has no quantization_config"),
    ],
)
def test_other_quantisations_are_refused_by_name(
    folders: Path, tmp_path: Path, block: dict[str, object] | None, text: str
) -> None:
    shutil.copytree(folders / "stacked", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": block}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=text):
        open_base(tmp_path / "base")

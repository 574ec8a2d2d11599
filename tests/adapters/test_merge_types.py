"""Merges to another type than the base's: bfloat16, float32 and fp8, against numpy on the raw bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import fp8_files as fp8
import merge_cases as cases
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from benchmarks.harness.memory import AnonymousPeak
from finetune.adapters.merge import Merged, merge
from finetune.adapters.merge_plan import plan_merge
from finetune.architecture.shapes import parameter_shapes
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.files.tiny import TinyModel, random_weights, write_tiny
from finetune.verify.codes import compare_codes
from launchers.cli import main

MODEL = TinyModel(
    hidden=384, expert_hidden=128, experts=3, layers=2, heads=8, head_dim=64, kv_heads=2, shard_bytes=400_000
)
DENSE = TinyModel(experts=None, intermediate=640, hidden=256, layers=2, heads=6, head_dim=64, kv_heads=2, tied=True)
LAYER = "model.language_model.layers.1."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a float32 base, a bfloat16 base, and an adapter for each."""
    folder = tmp_path_factory.mktemp("made")
    for name, dtype in (("f32", "float32"), ("bf16", "bfloat16")):
        write_tiny(folder / name, TinyModel(**{**MODEL.__dict__, "dtype": dtype}))
        cases.adapt(folder / name, folder / f"{name}-adapter", full=True)
    return folder


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Merged:
    return merge(plan_merge(open_base(base), adapter, **options), out)


def sums(base: Path, adapter: Path) -> dict[str, Any]:
    return cases.expected(cases.raw(base), cases.raw(adapter), scale=1.5, experts=3)


def near_codes(got: Any, ideal: Any) -> None:
    """A sum close to the middle of two codes may be rounded to the other one in float32."""
    apart = np.abs(got.astype(int) - ideal.astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 1e-4


@pytest.mark.parametrize(("base", "dtype"), [("f32", "bfloat16"), ("bf16", "float32")])
def test_floats_are_rounded_once_to_the_type_that_was_asked_for(
    made: Path, base: str, dtype: str, tmp_path: Path
) -> None:
    report = merged(made / base, made / f"{base}-adapter", tmp_path / "out", dtype=dtype)
    got, expected = cases.raw(tmp_path / "out"), sums(made / base, made / f"{base}-adapter")
    assert {name for name in got if not name.endswith(".bits")} == expected.keys()
    for name, values in expected.items():
        if dtype == "bfloat16":
            near = np.abs(got[name] - values) <= 2.0**-8 * np.abs(values) + 1e-6 * np.abs(values).max()
            assert near.all(), name
            assert (got[f"{name}.bits"] != cases.rounded(values)).mean() < 1e-3, name
        else:
            assert np.abs(got[name] - values).max() <= 1e-6 * np.abs(values).max(), name
    worst = max(change.error for change in report.changes.values())
    assert (worst < 1e-5) == (dtype == "float32"), "float32 holds every sum"
    assert not report.lost
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["dtype"] == dtype
    assert "quantization_config" not in config


def test_a_change_that_bfloat16_loses_is_named_though_the_base_is_in_float32(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "f32-adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: t * (1e-6 if ".lora_B." in name else 1) for name, t in load_file(file).items()}, file)
    report = merged(made / "f32", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert "model.visual.blocks.0.attn.qkv.weight" in report.lost
    assert not merged(made / "f32", tmp_path / "adapter", tmp_path / "exact").lost


@pytest.mark.parametrize("base", ["f32", "bf16"])
def test_fp8_holds_numpys_codes_and_scales_of_the_sum(made: Path, base: str, tmp_path: Path) -> None:
    report = merged(made / base, made / f"{base}-adapter", tmp_path / "out", dtype="fp8")
    got, expected = fp8.raw(tmp_path / "out"), sums(made / base, made / f"{base}-adapter")
    codes = {name for name, array in got.items() if array.dtype == np.uint8}
    text = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    assert codes == {n for n in expected if "language" in n and n.removesuffix(".weight").endswith(text)}
    assert got.keys() == expected.keys() | {f"{name}_scale_inv" for name in codes}
    for name, values in expected.items():
        if name in codes:
            ideal = fp8.quantised(values)
            assert got[f"{name}_scale_inv"].shape == ideal[1].shape
            np.testing.assert_allclose(got[f"{name}_scale_inv"], ideal[1], rtol=1e-5)
            near_codes(got[name], ideal[0])
            back = fp8.dequantised(got[name], got[f"{name}_scale_inv"]).astype(np.float64)
            apart = np.linalg.norm(back - values) / np.linalg.norm(values)
            assert report.quantised[name].error == pytest.approx(apart, rel=1e-3)
        else:
            bits = (got[name].view(np.uint32) >> 16).astype(int)
            assert np.abs(bits - cases.rounded(values).astype(int)).max() <= 1, name
    assert 0.02 < max(loss.error for loss in report.quantised.values()) < 0.05
    assert f"fp8      {len(codes)} tensors quantised: the weights are 2." in "\n".join(report.lines())
    assert report.intended == report.applied
    _described(tmp_path / "out", codes, set(expected))


def _described(folder: Path, codes: set[str], names: set[str]) -> None:
    """Every module that a reader might take for fp8 is named in config.json, and in the index."""
    config = json.loads((folder / "config.json").read_text())
    block = config["quantization_config"]
    assert block | {"modules_to_not_convert": []} == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": [],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    kept = set(block["modules_to_not_convert"])
    linear = ("q_proj", "o_proj", "gate", "qkv", "proj", "linear_fc1", "linear_fc2", "lm_head")
    modules = {name.removesuffix(".weight") for name in names - codes if name.endswith(".weight")}
    assert {module for module in modules if module.rpartition(".")[2] in linear} <= kept
    assert not kept & {name.removesuffix(".weight") for name in codes}
    assert config["text_config"]["dtype"] == "bfloat16"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(index[name] == index[f"{name}_scale_inv"] for name in codes)
    lines = (folder / "checksums.sha256").read_text().splitlines()
    assert len(lines) == len(list(folder.iterdir())) - 1


def test_transformers_computes_the_same_with_a_dense_fp8_folder(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", DENSE)
    model = cases.adapt(tmp_path / "base", tmp_path / "adapter", dense=True).eval().merge_and_unload()
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp8", shard_bytes=150_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model.layers" in name and parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(fp8.dequantised(*fp8.quantised(parameter.numpy()))))
            else:
                parameter.copy_(parameter.bfloat16())
    theirs = cases.stock(tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").quantization_config["quant_method"] == "fp8"
    apart = (cases.logits(theirs).float() - cases.logits(model)).abs().max()
    assert apart < 0.05 * cases.logits(model).std(), "transformers computes in bfloat16"


@pytest.mark.parametrize("layout", ["stacked", "per-expert"])
def test_an_fp8_base_keeps_its_codes_where_nothing_changes(layout: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", TinyModel(**{**MODEL.__dict__, "fp8": layout}))
    plain = fp8.weights(fp8.raw(tmp_path / "base"))
    _plain_base(tmp_path / "plain", plain)
    cases.adapt(tmp_path / "plain", tmp_path / "adapter")
    out = tmp_path / "out"
    report = merged(tmp_path / "base", tmp_path / "adapter", out)
    assert compare_codes(open_base(out), plan_merge(open_base(tmp_path / "base"), tmp_path / "adapter")).sound
    before, after = fp8.raw(tmp_path / "base"), fp8.raw(out)
    expected = sums(tmp_path / "plain", tmp_path / "adapter")
    kept = LAYER + "self_attn.k_proj.weight"
    assert kept not in report.quantised
    for key in (kept, f"{kept}_scale_inv"):
        assert np.array_equal(before[key], after[key])
    for name in report.quantised:
        ideal = fp8.quantised(expected[name])
        near_codes(after[name], ideal[0])
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())
    only_attention = tmp_path / "attention"
    shutil.copytree(tmp_path / "adapter", only_attention)
    file = only_attention / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".self_attn." in name}, file)
    settings = json.loads((only_attention / "adapter_config.json").read_text()) | {"target_parameters": None}
    settings["target_modules"] = ["q_proj", "o_proj"]
    (only_attention / "adapter_config.json").write_text(json.dumps(settings))
    merged(tmp_path / "base", only_attention, tmp_path / "stacks")
    stack = LAYER + "mlp.experts.gate_up_proj"
    got = fp8.raw(tmp_path / "stacks")
    assert np.array_equal(fp8.dequantised(got[stack], got[f"{stack}_scale_inv"]), cases.raw(tmp_path / "plain")[stack])
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "wide", dtype="float32")
    wide = cases.raw(tmp_path / "wide")
    assert wide.keys() == expected.keys()
    for name, values in expected.items():
        assert np.abs(wide[name] - values).max() <= 1e-6 * np.abs(values).max(), name
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())


def _plain_base(folder: Path, values: dict[str, Any]) -> None:
    """Write a float32 base with the values of an fp8 one."""
    write_tiny(folder, TinyModel(**{**MODEL.__dict__, "shard_bytes": 10**9}))
    half = {"gate": 0, "up": 1}
    stacks: dict[str, list[Any]] = {}
    for name in random_weights(parameter_shapes(read_family(folder)), dtype="float32", seed=0):
        if name[0] not in values:
            stem, _, kind = name[0].rpartition(".")
            parts = ("down",) if kind == "down_proj" else tuple(half)
            stacks[name[0]] = [
                np.concatenate([values[f"{stem}.{expert}.{part}_proj.weight"] for part in parts]).T
                for expert in range(3)
            ]
    arrays = {name: array for name, array in values.items() if ".experts.0" not in name and name not in stacks}
    arrays = {name: array for name, array in arrays.items() if not any(f".experts.{e}." in name for e in range(3))}
    arrays |= {name: np.stack(each) for name, each in stacks.items()}
    fp8.changed(folder, **{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def test_sizes_that_servers_read_differently_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base")
    cases.adapt(tmp_path / "base", tmp_path / "adapter")
    words = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"), "--dtype", "fp8"]
    with pytest.raises(ValueError, match=r"whose sizes 128 divides, .*: .*0.self_attn.q_proj.weight .64, 48., "):
        merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp8")
    assert main(words) == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--dtype must be one of bfloat16, float32, fp8, got 'int8'"):
        plan_merge(open_base(tmp_path / "base"), tmp_path / "adapter", dtype="int8")


def test_a_weight_that_is_not_finite_cannot_be_quantised(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "f32-adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".q_proj.lora_A" in name)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="q_proj.weight: a weight to be quantised is not finite"):
        merged(made / "f32", tmp_path / "adapter", tmp_path / "out", dtype="fp8")
    assert not (tmp_path / "out").exists()


def test_memory_is_bounded_by_one_expert(tmp_path: Path) -> None:
    wide = TinyModel(hidden=640, expert_hidden=512, experts=12, layers=1, heads=6, head_dim=64)
    write_tiny(tmp_path / "base", wide)
    cases.adapt(tmp_path / "base", tmp_path / "adapter")
    plan = plan_merge(open_base(tmp_path / "base"), tmp_path / "adapter", dtype="fp8")
    with AnonymousPeak() as memory:
        merge(plan, tmp_path / "out", jobs=1)
    assert memory.peak_bytes < 0.75 * 12 * 1024 * 640 * 4, "the largest stack"

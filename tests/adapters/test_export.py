"""Adapters exported for servers: they read back as the same changes, and stock PEFT computes the same with them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch
from bases import base
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune.adapters.export import compare, export, notes
from finetune.adapters.source import open_source
from finetune.files.basefiles import open_base
from finetune.files.readers import TESTED
from launchers.cli import main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's changes in float64, summed rank by rank so that padding with zeros changes no digit."""
    changes = {}
    for name, change in open_source(folder, open_base(base()).shapes).changes.items():
        a, b = (factor.double() for factor in change.read())
        changes[name] = change.scale * sum(b[:, :, k : k + 1] @ a[:, k : k + 1] for k in range(a.shape[1]))
    return changes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, cases.logits(cases.adapt(base(), folder).eval())


@pytest.fixture
def mixed(plain: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """An adapter with another rank and scale for q_proj, and with only one expert stack in one layer."""
    shutil.copytree(plain[0], tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / WEIGHTS)
    for name in list(tensors):
        if "q_proj.lora_A" in name:
            tensors[name] = tensors[name][:3].clone()
        elif "q_proj.lora_B" in name:
            tensors[name] = tensors[name][:, :3].clone()
        elif "layers.2.mlp.experts.base_layer" in name:
            del tensors[name]
    save_file(tensors, tmp_path / "mixed" / WEIGHTS)
    config = json.loads((tmp_path / "mixed" / CONFIG).read_text())
    config |= {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}, "target_parameters": ["down_proj"]}
    (tmp_path / "mixed" / CONFIG).write_text(json.dumps(config))
    return tmp_path / "mixed"


@pytest.mark.parametrize("form", ["peft", "per-expert"])
def test_an_export_read_back_gives_the_same_changes_exactly(
    form: Any, plain: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    done = export(plain[0], tmp_path / "out", form=form)
    assert done.exact
    exported, expected = deltas(tmp_path / "out"), deltas(plain[0])
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    again = export(tmp_path / "out", tmp_path / "back", form="peft")
    assert again.bytes == sum(t.nbytes for t in load_file(plain[0] / WEIGHTS).values())
    original, back = load_file(plain[0] / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)


def test_stock_peft_reads_the_packed_form(plain: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    export(plain[0], tmp_path / "out", form="peft")
    model = PeftModel.from_pretrained(cases.stock(base()), tmp_path / "out").eval()
    assert (cases.logits(model) - plain[1]).abs().max() <= 1e-5 * plain[1].abs().max()


@pytest.mark.parametrize("form", ["peft", "per-expert"])
def test_an_export_has_one_rank_and_one_scale_for_servers(form: Any, mixed: Path, tmp_path: Path) -> None:
    done = export(mixed, tmp_path / "out", form=form, shapes=open_base(base()).shapes)
    assert (done.r, done.scale, done.exact) == (4, 1.5, False)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 6.0, {}, {})
    exported, expected = deltas(tmp_path / "out"), deltas(mixed)
    missing = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    assert exported.keys() - expected.keys() == {missing}
    assert not exported[missing].any(), "both stacks are present, and the added one changes nothing"
    for name, value in expected.items():
        assert (exported[name] - value).abs().max() <= 1e-6 * value.abs().max()
    experts = {name for name in expected if "experts" in name}
    assert all(torch.equal(exported[name], expected[name]) for name in experts)
    assert "several scales" in (tmp_path / "out" / "README.md").read_text()


def test_per_expert_keys_are_plain_pairs(plain: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    export(plain[0], tmp_path / "out", form="per-expert")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert all(tensor.ndim == 2 for tensor in tensors.values())
    stem = "base_model.model.model.language_model.layers.1.mlp.experts.7"
    assert tensors[f"{stem}.up_proj.lora_A.weight"].shape == (4, 48)
    assert tensors[f"{stem}.down_proj.lora_B.weight"].shape == (48, 4)
    packed = load_file(plain[0] / WEIGHTS)
    both = packed[f"{stem[:-2]}.base_layer.lora_B.weight"]
    assert torch.equal(tensors[f"{stem}.up_proj.lora_B.weight"], both[40:, 7::8])
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "o_proj", "q_proj", "qkv", "up_proj"]
    assert not config["target_parameters"]


def test_the_page_names_the_programs_that_read_it(
    plain: tuple[Path, torch.Tensor], tmp_path: Path, capsys: Any
) -> None:
    assert main(["export", str(plain[0]), str(tmp_path / "a"), "--format", "peft", "--base", str(base())]) == 0
    assert "read back, they are bit for bit the same" in capsys.readouterr().out
    assert main(["export", str(plain[0]), str(tmp_path / "b"), "--format", "per-expert"]) == 0
    assert "note: it adapts the vision side" in capsys.readouterr().out
    first, second = ((tmp_path / name / "README.md").read_text() for name in "ab")
    assert re.search(r"vllm serve \S+ --enable-lora --max-lora-rank 8 --lora-modules", first)
    assert "it adapts the vision side" in first
    assert f"- vLLM {TESTED['vllm']} (its CPU build): equal to training on a dense base" in first
    assert re.search(r"sglang.launch_server --model-path \S+ --enable-lora --lora-paths .* --max-lora-rank 4", second)
    assert "No server was run with this form" in second
    assert "--max-lora-rank 600" in notes("peft", "base", 600, [])


def test_full_tensors_are_exported_only_for_peft(tmp_path: Path) -> None:
    model = cases.adapt(base(), tmp_path / "full", full=True)
    with pytest.raises(ValueError, match=r"stores tensors in full \(2, first .*merger.norm.*Merge it instead"):
        export(tmp_path / "full", tmp_path / "out", form="per-expert")
    done = export(tmp_path / "full", tmp_path / "out", form="peft")
    assert any("PEFT reads them, vLLM refuses them" in line for line in done.warnings)
    expected = cases.logits(model.eval())
    exported = cases.logits(PeftModel.from_pretrained(cases.stock(base()), tmp_path / "out").eval())
    assert (exported - expected).abs().max() <= 1e-5 * expected.abs().max()
    tensors = load_file(tmp_path / "full" / WEIGHTS)
    name = "base_model.model.model.language_model.layers.0.mlp.gate.lora_"
    factors = {f"{name}A.weight": torch.ones(4, 48), f"{name}B.weight": torch.ones(8, 4)}
    save_file(tensors | factors, tmp_path / "full" / WEIGHTS)
    assert any("adapts routers" in line for line in export(tmp_path / "full", tmp_path / "r", form="peft").warnings)


def test_an_unknown_format_and_a_file_that_reads_back_differently(
    plain: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--format 'gguf' is unknown; use peft, per-expert"):
        export(plain[0], tmp_path / "out", form="gguf")
    from finetune.adapters.write import OutChange

    source = open_source(plain[0])
    change = next(iter(source.changes.values()))
    other = OutChange(
        target=change.target,
        shape=change.shape,
        r=change.r,
        scale=change.scale,
        dtype="F32",
        read=lambda: tuple(1.5 * factor for factor in change.read()),
    )
    with pytest.raises(ValueError, match="reads back with other values than were written"):
        compare(source, [other])

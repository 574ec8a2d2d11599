"""Sums of adapters: the changes are the weighted sum, exactly or as closely as the rank allows."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch
from bases import base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from finetune.adapters.combine import combine
from finetune.adapters.file import open_adapter
from finetune.adapters.merge import merge
from finetune.adapters.merge_plan import plan_merge
from finetune.adapters.provenance import Provenance, base_of
from finetune.adapters.source import open_source
from finetune.files.basefiles import open_base
from finetune.files.tiny import TinyModel, write_tiny
from launchers.cli import main

WEIGHTS = "adapter_model.safetensors"


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    changes = {}
    for name, change in open_source(folder, open_base(base()).shapes).changes.items():
        a, b = (factor.double() for factor in change.read())
        changes[name] = change.scale * (b @ a)
    return changes


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters. a: experts and more, r 4; b: like a, with r 6 and other values; c: attention only."""
    folder = tmp_path_factory.mktemp("three")
    cases.adapt(base(), folder / "a")
    cases.adapt(base(), folder / "b", r=6, size=0.08)
    model = get_peft_model(cases.stock(base()), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder / "c")
    return folder


def summed(parts: dict[Path, float]) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    for folder, weight in parts.items():
        for name, value in deltas(folder).items():
            sums[name] = sums.get(name, torch.zeros(())) + weight * value
    return sums


# PEFT warns about patterns for parameters, but applies them
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_concatenated_factors_give_the_sum(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {three / "a": 0.7, three / "b": -0.3, three / "c": 1.5}
    assert main(["combine", str(tmp_path / "out"), *(f"{folder}={weight}" for folder, weight in parts.items())]) == 0
    assert "exact: factors are concatenated" in capsys.readouterr().out
    combined, expected = deltas(tmp_path / "out"), summed(parts)
    assert combined.keys() == expected.keys()
    for name, value in expected.items():
        assert (combined[name] - value).abs().max() <= 1e-6 * value.abs().max(), name
    assert {c.r for n, c in open_source(tmp_path / "out").changes.items() if "experts" in n} == {10}
    model = PeftModel.from_pretrained(cases.stock(base()), tmp_path / "out").eval()
    merge(plan_merge(open_base(base()), tmp_path / "out"), tmp_path / "merged")
    logits = cases.logits(model)
    assert (cases.logits(cases.stock(tmp_path / "merged")) - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_a_smaller_rank_is_the_best_approximation_and_reports_its_error(
    three: Path, tmp_path: Path, capsys: Any
) -> None:
    parts = {three / "a": 0.5, three / "b": 0.5}
    expected, combined = summed(parts), combine(parts, tmp_path / "out", rank=5)
    assert not combined.exact
    got = deltas(tmp_path / "out")
    lost = total = 0.0
    for name, value in expected.items():
        singular = torch.linalg.svdvals(value)  # of the full changes, not of their factors
        best = float((singular[..., 5:] ** 2).sum())
        apart = float(((got[name] - value) ** 2).sum())
        assert apart == pytest.approx(best, rel=1e-4)
        assert combined.errors[name] == pytest.approx((best / float((value**2).sum())) ** 0.5, rel=1e-4)
        lost, total = lost + apart, total + float((value**2).sum())
    assert 0.05 < combined.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    words = [f"{folder}={weight}" for folder, weight in parts.items()]
    assert main(["combine", str(tmp_path / "again"), *words, "--rank", "5"]) == 0
    assert re.search(
        rf"{combined.error:.2%} off the exact sum; the largest errors:\n  model\.", capsys.readouterr().out
    )
    assert combine(parts, tmp_path / "enough", rank=10).exact


def with_metadata(source: Path, out: Path, metadata: dict[str, str]) -> Path:
    shutil.copytree(source, out)
    save_file(load_file(out / WEIGHTS), out / WEIGHTS, metadata=metadata)
    return out


def test_parents_base_and_families_are_in_the_file(three: Path, tmp_path: Path) -> None:
    metadata = Provenance(base=open_base(base()), base_name="hub/tiny").metadata()
    metadata |= {"moetune.model_type": "qwen3_vl_moe", "moetune.orientation": "experts [out, in]"}
    a, b = (with_metadata(three / name, tmp_path / name, metadata) for name in "ab")
    combine({a: 0.75, b: 0.25}, tmp_path / "out")
    adapter = open_adapter(tmp_path / "out")
    assert base_of(adapter.metadata) == base_of(metadata)
    parents = json.loads(adapter.metadata["moetune.parent"])
    assert [(parent["folder"], parent["weight"]) for parent in parents] == [(str(a), 0.75), (str(b), 0.25)]
    ranks = {part: (lora.r, lora.scale) for part, lora in adapter.families.items() if lora}
    assert ranks == dict.fromkeys(("attention", "experts", "vision_blocks"), (10, 1.0))
    assert f"derived from: {a} (sha256 `" in (tmp_path / "out" / "README.md").read_text()
    write_tiny(tmp_path / "other", TinyModel(seed=1))
    elsewhere = metadata | Provenance(base=open_base(tmp_path / "other"), base_name="hub/other").metadata()
    other = with_metadata(three / "b", tmp_path / "b2", elsewhere)
    with pytest.raises(ValueError, match=r"a was trained on hub/tiny \(.*\), .*b2 on hub/other \(.* fits neither base"):
        combine({a: 0.5, other: 0.5}, tmp_path / "no")


def test_impossible_sums_are_refused(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = three / "a"
    for words, text in {
        (f"{a}",): "must be ADAPTER=WEIGHT",
        (f"{a}=x",): "must be ADAPTER=WEIGHT",
        (f"{a}=1",): "a sum needs at least two adapters",
        (f"{a}=1", f"{a}=2"): "is named twice",
        (f"{a}=0", f"{three / 'b'}=1"): "its weight is 0.0; it must be a finite number other than 0",
        (f"{a}=1", f"{three / 'b'}=1", "--rank=-1"): "--rank must be at least 1, got -1",
    }.items():
        assert main(["combine", str(tmp_path / "out"), *words]) == 2
        assert text in capsys.readouterr().err
    write_tiny(tmp_path / "other", TinyModel(hidden=64))
    cases.adapt(tmp_path / "other", tmp_path / "wide")
    with pytest.raises(ValueError, match=r"o_proj.weight is \[48, 64\] in .* and \[64, 64\] in .*different bases"):
        combine({a: 0.5, tmp_path / "wide": 0.5}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_tensors_are_summed_if_that_needs_no_base(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases.adapt(base(), tmp_path / "full", full=True)
    shutil.copytree(tmp_path / "full", tmp_path / "twice")
    tensors = load_file(tmp_path / "twice" / WEIGHTS)
    (name,) = (key for key in tensors if key.endswith("merger.norm.weight"))
    first = tensors[name].clone()
    save_file(tensors | {name: 3 * first}, tmp_path / "twice" / WEIGHTS)
    combine({tmp_path / "full": 0.75, tmp_path / "twice": 0.25}, tmp_path / "out")
    assert torch.allclose(load_file(tmp_path / "out" / WEIGHTS)[name], 1.5 * first)
    for folder, factor in (("full", 1.0), ("twice", 1.01)):  # bfloat16, as in runs of large models
        narrow = {
            key: (factor * t).bfloat16() if key == name else t
            for key, t in load_file(tmp_path / "full" / WEIGHTS).items()
        }
        save_file(narrow, tmp_path / folder / WEIGHTS)
    words = [f"{tmp_path / 'full'}=0.7", f"{tmp_path / 'twice'}=0.3"]
    assert main(["combine", str(tmp_path / "narrow"), *words]) == 0
    assert "full tensors are summed, in float32; only its rounding" in capsys.readouterr().out
    both = [load_file(tmp_path / folder / WEIGHTS)[name].double() for folder in ("full", "twice")]
    total = load_file(tmp_path / "narrow" / WEIGHTS)[name]
    assert total.dtype == torch.float32
    assert torch.allclose(total.double(), 0.7 * both[0] + 0.3 * both[1], rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"merger.norm.* is stored in full, and .*a does not have it: such a sum needs"
    ):
        combine({tmp_path / "full": 0.5, three / "a": 0.5}, tmp_path / "no")
    with pytest.raises(ValueError, match=r"is stored in full, and the weights add up to 2, not 1"):
        combine({tmp_path / "full": 1.0, tmp_path / "twice": 1.0}, tmp_path / "no")
    save_file(tensors | {name: first[:5].clone()}, tmp_path / "twice" / WEIGHTS)
    with pytest.raises(ValueError, match=r"merger.norm.weight has different shapes in these adapters"):
        combine({tmp_path / "full": 0.5, tmp_path / "twice": 0.5}, tmp_path / "no")

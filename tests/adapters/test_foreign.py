"""Unusual files that stock PEFT writes: copies of the base, biases, tied heads, ranks by layer."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch
from bases import base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from finetune.adapters.change import Change
from finetune.adapters.combine import combine
from finetune.adapters.contents import read_families
from finetune.adapters.export import export
from finetune.adapters.merge import merge
from finetune.adapters.merge_plan import plan_merge
from finetune.adapters.source import open_source
from finetune.ask.open_model import open_speaker
from finetune.files.basefiles import open_base
from finetune.files.tensorfile import read_header
from finetune.files.tiny import TinyModel, write_tiny
from launchers.cli import main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def made(folder: Path, out: Path, **values: Any) -> Any:
    """Let stock PEFT save an adapter with random values everywhere; return PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(cases.stock(folder), LoraConfig(lora_alpha=6, **values))
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
                if ".lora_" in name:
                    parameter.data.normal_(std=0.1)
        model.save_pretrained(out)
    return model.eval()


def reloaded(folder: Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cases.logits(PeftModel.from_pretrained(cases.stock(folder), adapter).eval())


def delta(change: Change) -> torch.Tensor:
    a, b = (factor.double() for factor in change.read())
    return change.scale * b @ a


def test_a_copy_of_the_head_saved_with_its_factors_is_compared_with_the_base(tmp_path: Path) -> None:
    expected = cases.logits(made(base(), tmp_path / "a", r=4, target_modules=["q_proj", "lm_head"]))
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(tmp_path / "a" / WEIGHTS)
    merge(plan_merge(open_base(base()), tmp_path / "a"), tmp_path / "merged")
    close = 1e-5 * expected.abs().max()
    assert (cases.logits(cases.stock(tmp_path / "merged")) - expected).abs().max() <= close
    exported = export(tmp_path / "a", tmp_path / "exported", form="peft")
    assert any("copy of the base's lm_head.weight" in text for text in exported.warnings)
    assert (reloaded(base(), tmp_path / "exported") - expected).abs().max() <= close
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors[copy][3, 5] += 1
    save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    other = r"holds a copy of lm_head.weight .* other values than .* has"
    with pytest.raises(ValueError, match=other):
        plan_merge(open_base(base()), tmp_path / "a")
    with pytest.raises(ValueError, match=other):
        open_speaker(str(base()), adapter=tmp_path / "a")


def test_biases_are_refused_by_name(tmp_path: Path) -> None:
    for bias in ("all", "lora_only"):
        made(base(), tmp_path / bias, r=4, target_modules=r".*visual.*qkv", bias=bias)
        with pytest.raises(ValueError, match=f"bias is '{bias}'; only plain LoRA"):
            open_source(tmp_path / bias)


def test_a_separate_embedding_does_not_fit_a_tied_base(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", TinyModel(layers=1, tied=True))
    made(tmp_path / "base", tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens.weight alone, but this base ties its head to it"):
        plan_merge(open_base(tmp_path / "base"), tmp_path / "a")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_a_sum_of_adapters_with_different_ranks_by_layer(tmp_path: Path) -> None:
    """One adapter has only the first layer, another has other ranks in the second; no pattern may mix layers up."""
    made(base(), tmp_path / "one", r=4, target_modules=["q_proj"], target_parameters=cases.STACKS)
    made(base(), tmp_path / "two", r=2, target_modules=["q_proj", "o_proj"], layers_to_transform=[0])
    by_layer = {r"layers\.1\.self_attn\.q_proj": 3, r"layers\.1\.mlp\.experts\.down_proj": 5}
    made(
        base(),
        tmp_path / "three",
        r=4,
        target_modules=["q_proj"],
        target_parameters=cases.STACKS,
        rank_pattern=by_layer,
    )
    weights = {tmp_path / "one": 0.5, tmp_path / "two": 2.0, tmp_path / "three": 1.0}
    combine(weights, tmp_path / "sum")
    merge(plan_merge(open_base(base()), tmp_path / "sum"), tmp_path / "merged")
    expected = reloaded(base(), tmp_path / "sum")
    assert (cases.logits(cases.stock(tmp_path / "merged")) - expected).abs().max() <= 1e-5 * expected.abs().max()
    shapes = open_base(base()).shapes
    parts = [(open_source(folder, shapes).changes, weight) for folder, weight in weights.items()]
    for name, change in open_source(tmp_path / "sum", shapes).changes.items():
        total = sum(weight * delta(changes[name]) for changes, weight in parts if name in changes)
        assert torch.allclose(delta(change), total, atol=1e-6), name


def test_invalid_numbers_in_a_config_are_named(tmp_path: Path) -> None:
    made(base(), tmp_path / "a", r=4, target_modules=["q_proj"])
    whole = json.loads((tmp_path / "a" / CONFIG).read_text())
    for values, message in (
        ({"r": None}, r"adapter_config.json: r is None; it must be a whole number of at least 1"),
        ({"r": 0}, "r is 0; it must be a whole number"),
        ({"r": "four"}, "r is 'four'; it must be a whole number"),
        ({"r": 4.5}, "r is 4.5; it must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be a finite number"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]; it must be an object of numbers by pattern"),
        ({"rank_pattern": {"k_proj": 0}}, r"rank_pattern\['k_proj'\] is 0; it must be a whole number"),
        ({"alpha_pattern": {"k_proj(": 1}}, r"'k_proj\(' is not a valid regular expression"),
    ):
        (tmp_path / "a" / CONFIG).write_text(json.dumps(whole | values))
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "a")


@pytest.mark.parametrize("form", ["packed", "single"])
@pytest.mark.parametrize(
    "gone", [r"layers\.1\.mlp", r"layers\.2\.self_attn\.q_proj", r"layers\.1\.mlp\.experts\.(lora|\d+\.d)"]
)
def test_an_adapter_of_one_stage_is_not_taken_for_complete(form: str, gone: str, tmp_path: Path) -> None:
    made(base(), tmp_path / "packed", r=4, target_modules=["q_proj"], target_parameters=cases.STACKS)
    export(tmp_path / "packed", tmp_path / "single", form="per-expert", shapes=open_base(base()).shapes)
    tensors = load_file(tmp_path / form / WEIGHTS)
    left = {name: tensor for name, tensor in tensors.items() if not re.search(gone, name)}
    assert left.keys() < tensors.keys()
    save_file(left, tmp_path / form / WEIGHTS, metadata={"moetune.orientation": "experts [out, in]"})
    with pytest.raises(ValueError, match=r"is incomplete: adapter_config.json says that .* has no factors for it"):
        plan_merge(open_base(base()), tmp_path / form)


def test_layers_left_out_on_purpose_are_not_reported(tmp_path: Path) -> None:
    for number, values in enumerate(
        (
            {"target_modules": ["q_proj", "qkv"], "layers_to_transform": [0, 2]},
            {"target_modules": ["q_proj", "qkv"], "layers_to_transform": 1},
            {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*", "target_parameters": cases.STACKS},
            {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]},
            {"target_modules": "all-linear", "modules_to_save": ["merger", "layers.0.self_attn"]},
            {"target_modules": r".*layers\.[02].*v_proj"},
        )
    ):
        made(base(), tmp_path / str(number), r=4, **values)
        assert open_source(tmp_path / str(number), open_base(base()).shapes).changes


def test_metadata_changed_by_another_program_is_named(tmp_path: Path) -> None:
    made(base(), tmp_path / "a", r=4, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    for key, text, message in (
        ("moetune.base", "xx", "metadata moetune.base is not valid JSON"),
        ("moetune.base", "[" * 100_000, "metadata moetune.base is not valid JSON"),
        ("moetune.base", "[1]", r"metadata moetune.base is '\[1\]', not an object"),
        ("moetune.base", "{}", "moetune.base is '{}', without name and fingerprint: .* get the adapter again"),
        ("moetune.config", "[]", "metadata moetune.config is .* not an object"),
    ):
        save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={key: text})
        with pytest.raises(ValueError, match=message):
            plan_merge(open_base(base()), tmp_path / "a")


ODD = {
    "target_modules": ({"target_modules": 5}, "target_modules is 5; it must be a list of names, or for targets one"),
    "nested": ({"exclude_modules": [["q_proj"]]}, r"exclude_modules is \[\['q_proj'\]\]; it must be a list"),
    "saved": ({"modules_to_save": "merger"}, "modules_to_save is merger; it must be a list of names"),
    "layers": ({"layers_to_transform": "0"}, "layers_to_transform is 0; it must be a number or a list of numbers"),
    "pattern": ({"modules_to_save": ["("]}, r"'\(' is not a valid regular expression"),
    "slow": ({"rank_pattern": {"(x|x|[a-z_.0-9]+)*!": 4}}, r"'\(x.*' cannot be matched against the names .* in 0.5 s"),
    "slow too": (
        {"target_modules": ".*.*.*.*.*.*.*.*.*.*!"},
        r"cannot be matched against the names of a model's tensors",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_config_that_would_hang_or_confuse_a_reader_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, message = ODD[name]
    made(base(), tmp_path, r=4, target_modules=["q_proj"])
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | values))
    monkeypatch.setattr("finetune.adapters.targets._SECONDS", 0.5)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, open_base(base()).shapes)


def test_a_long_expression_that_matches_quickly_is_read(tmp_path: Path) -> None:
    pattern = (
        r"(?:.*?(?:visual|text).*?(?:attn|mlp).*?(?:qkv|q_proj).*?)|(?:.*layers\.[\d]{1,}\.(?:self_attn)\.(?:q_proj))"
    )
    made(base(), tmp_path, r=4, target_modules=pattern)
    assert open_source(tmp_path, open_base(base()).shapes).changes


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        '{"attention": 5}',
        '{"attention": {"r": "x", "alpha": 1}}',
        '{"attention": {"q": 1}}',
        '{"else": {}}',
        '{"attention": {"r": 0, "alpha": 1}}',
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_bad_families_are_named(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"metadata moetune.families is .*, not what moetune writes .* get the adapter"
    ):
        read_families(text)


def test_a_per_expert_export_with_vision_targets_can_be_merged(tmp_path: Path) -> None:
    """Its targets are last components of names; `proj` also matches the patch embedding, which it does not adapt."""
    made(base(), tmp_path / "a", r=4, target_modules=["q_proj", "attn.proj"], target_parameters=cases.STACKS)
    export(tmp_path / "a", tmp_path / "b", form="per-expert")
    merge(plan_merge(open_base(base()), tmp_path / "a"), tmp_path / "one")
    merge(plan_merge(open_base(base()), tmp_path / "b"), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    tensors = {name: t for name, t in load_file(tmp_path / "b" / WEIGHTS).items() if "blocks.1.attn.proj" not in name}
    save_file(tensors, tmp_path / "b" / WEIGHTS, metadata=read_header(tmp_path / "b" / WEIGHTS)[1])
    with pytest.raises(
        ValueError, match=r"is incomplete: it was exported with \d+ changes and has \d+. Export it again"
    ):
        plan_merge(open_base(base()), tmp_path / "b")


def test_an_adapter_with_nan_is_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(base(), tmp_path / "a", r=4, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    assert main(["ask", str(base()), "What?", "--adapter", str(tmp_path / "a"), "--max-tokens", "2"]) == 2
    assert "lora_B.weight holds NaN or infinity; the run diverged" in capsys.readouterr().err

"""Files that stock PEFT writes beside the usual ones: copies of the base, biases, tied heads, ranks by layer."""

import warnings
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch
from bases import base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from finetune.adapter_change import Change
from finetune.adapter_source import open_source
from finetune.basefiles import open_base
from finetune.combine import combine
from finetune.export import export
from finetune.merge import merge
from finetune.merge_plan import plan_merge
from finetune.speaker import open_speaker
from finetune.tiny import TinyModel, write_tiny

WEIGHTS = "adapter_model.safetensors"


def made(folder: Path, out: Path, **values: Any) -> Any:
    """Let stock PEFT save an adapter whose every number is random; return PEFT's model."""
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


def test_a_copy_of_the_head_beside_its_factors_is_compared_with_the_base(tmp_path: Path) -> None:
    wanted = cases.logits(made(base(), tmp_path / "a", r=4, target_modules=["q_proj", "lm_head"]))
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(tmp_path / "a" / WEIGHTS)
    merge(plan_merge(open_base(base()), tmp_path / "a"), tmp_path / "merged")
    close = 1e-5 * wanted.abs().max()
    assert (cases.logits(cases.stock(tmp_path / "merged")) - wanted).abs().max() <= close
    found = export(tmp_path / "a", tmp_path / "exported", form="peft")
    assert any("copy of the base's lm_head.weight" in text for text in found.warnings)
    assert (reloaded(base(), tmp_path / "exported") - wanted).abs().max() <= close
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors[copy][3, 5] += 1
    save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    other = r"holds a copy of lm_head.weight .* other values than .* has"
    with pytest.raises(ValueError, match=other):
        plan_merge(open_base(base()), tmp_path / "a")
    with pytest.raises(ValueError, match=other):
        open_speaker(str(base()), adapter=tmp_path / "a")


def test_biases_are_refused_by_their_name(tmp_path: Path) -> None:
    for bias in ("all", "lora_only"):
        made(base(), tmp_path / bias, r=4, target_modules=r".*visual.*qkv", bias=bias)
        with pytest.raises(ValueError, match=f"bias is '{bias}'; only plain LoRA"):
            open_source(tmp_path / bias)


def test_an_embedding_of_its_own_does_not_fit_a_tied_base(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", TinyModel(layers=1, tied=True))
    made(tmp_path / "base", tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens.weight alone, and this base ties its head to it"):
        plan_merge(open_base(tmp_path / "base"), tmp_path / "a")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_a_sum_whose_ranks_differ_by_layer_says_each(tmp_path: Path) -> None:
    """One adapter holds the first layer only, and one has another rank there: no pattern may speak for other layers."""
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
    wanted = reloaded(base(), tmp_path / "sum")
    assert (cases.logits(cases.stock(tmp_path / "merged")) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    shapes = open_base(base()).shapes
    parts = [(open_source(folder, shapes).changes, weight) for folder, weight in weights.items()]
    for name, change in open_source(tmp_path / "sum", shapes).changes.items():
        total = sum(weight * delta(changes[name]) for changes, weight in parts if name in changes)
        assert torch.allclose(delta(change), total, atol=1e-6), name

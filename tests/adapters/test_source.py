"""Adapters of every form are read as changes to the base; stock PEFT defines what each form means."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_moe import vl_model
from torch import Tensor

from finetune.adapters.change import Change
from finetune.adapters.source import AdapterSource, open_source

STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def wrapped(*, parameters: tuple[str, ...] = STACKS, old: bool = False, r: int = 4, **dims: int) -> Any:
    """Stock PEFT around the stock model, with random factors; `old` makes PEFT treat experts as 0.18 did."""
    model = vl_model(layers=2, **dims)
    if old:
        for layer in model.model.language_model.layers:
            layer.mlp.experts.is_transposed = True
    config = LoraConfig(
        r=r,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj"],
        target_parameters=list(parameters) or None,
        rank_pattern={"o_proj": 3},
        alpha_pattern={"o_proj": 7},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped_model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in wrapped_model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_()
    return wrapped_model


def saved(model: Any, folder: Path, *, version: str | None = None) -> Path:
    model.save_pretrained(folder)
    if version is not None:
        edit(folder, peft_version=version)
    return folder


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(config))


def rewrite(folder: Path, change: Any, metadata: dict[str, str] | None = None) -> None:
    """Let `change` edit the file's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata=metadata)


def meant(model: Any) -> dict[str, Tensor]:
    """The change that PEFT itself makes to each tensor of the base."""
    changes = {}
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        parameter = getattr(module, "parameter_name", "weight")
        module.num_experts = getattr(module, "num_experts", 1)
        plain = name.replace(".base_layer", "")
        changes[f"{plain}.{parameter}"] = module.get_delta_weight("default").detach()
    return changes


def delta(change: Change) -> Tensor:
    a_Eri, b_Eor = change.read()
    product = change.scale * (b_Eor @ a_Eri)
    return product if len(change.shape) == 3 else product[0]


def shapes_of(model: Any) -> dict[str, Any]:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    names = {n.replace(".base_layer", ""): tuple(p.shape) for n, p in plain.named_parameters()}
    return {name: shape for name, shape in names.items() if ".lora_" not in name}


def check(source: AdapterSource, expected: dict[str, Tensor]) -> None:
    assert source.changes.keys() == expected.keys()
    for name, change in source.changes.items():
        assert change.shape == expected[name].shape
        assert torch.allclose(delta(change), expected[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "dims",
    [{}, {"hidden": 80}, {"hidden": 40}, {"experts": 4}, {"hidden": 80, "experts": 4}],
    ids=["plain", "H=2F", "H=F", "E=r", "H=2F,E=r"],
)
@pytest.mark.parametrize("known", [True, False], ids=["base", "no base"])
def test_both_orientations_of_peft_are_read_correctly(
    old: bool, dims: dict[str, int], known: bool, tmp_path: Path
) -> None:
    model = wrapped(old=old, **dims)
    folder = saved(model, tmp_path, version="0.18.1" if old else None)
    check(open_source(folder, shapes_of(model) if known else None), meant(model))


@pytest.mark.parametrize("stack", STACKS)
def test_a_single_stack_is_the_one_that_the_config_names(stack: str, tmp_path: Path) -> None:
    for old in (False, True):
        model = wrapped(parameters=(stack,), old=old)
        folder = saved(model, tmp_path / str(old))
        check(open_source(folder, shapes_of(model)), meant(model))
    edit(folder, target_parameters=None)
    with pytest.raises(ValueError, match="has factors of one stack only, and target_parameters"):
        open_source(folder)


def test_ambiguous_orientations_are_refused_unless_the_file_names_one(tmp_path: Path) -> None:
    model = wrapped(parameters=STACKS[:1], hidden=80)
    folder = saved(model, tmp_path, version="0.18.1")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj has factors \[48, 80\] and \[80, 48\], which fit this"):
        open_source(folder, shapes_of(model))
    edit(folder, peft_version="0.19.1")
    check(open_source(folder, shapes_of(model)), meant(model))
    edit(folder, peft_version=None)
    rewrite(folder, lambda tensors: None, {"moetune.orientation": "experts [out, in]"})
    check(open_source(folder, shapes_of(model)), meant(model))


def test_two_orientations_in_one_file_are_refused(tmp_path: Path) -> None:
    plain, turned = wrapped(), wrapped(old=True)
    old = load_file(saved(turned, tmp_path / "old") / WEIGHTS)
    swap = {name: tensor for name, tensor in old.items() if "layers.1.mlp.experts" in name}
    rewrite(saved(plain, tmp_path / "mixed"), lambda tensors: tensors.update(swap))
    refused(tmp_path / "mixed", "mixes two orientations: .*experts.* is", shapes_of(plain))


def singles(folder: Path, model: Any, *, shared: bool, names: tuple[str, str, str]) -> dict[str, Tensor]:
    """Write 2-D keys for each expert; return the changes that they mean, computed here."""
    torch.manual_seed(3)
    tensors, changes = {}, {}
    for name, shape in shapes_of(model).items():
        if not name.endswith(STACKS):
            continue
        stem, stack = name.rpartition(".")[0], []
        for expert in range(shape[0]):
            halves = [(names[2], shape[1])] if name.endswith("down_proj") else [(n, shape[1] // 2) for n in names[:2]]
            a, rows = torch.randn(4, shape[2]), []
            for part, out in halves:
                a = a if shared else torch.randn(4, shape[2])
                b = torch.randn(out, 4)
                tensors[f"base_model.model.{stem}.{expert}.{part}.lora_A.weight"] = a.clone()
                tensors[f"base_model.model.{stem}.{expert}.{part}.lora_B.weight"] = b
                rows.append(1.5 * b @ a)
            stack.append(torch.cat(rows))
        changes[name] = torch.stack(stack)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": []}))
    return changes


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_keys_expert_by_expert(shared: bool, names: tuple[str, str, str], tmp_path: Path) -> None:
    model = vl_model(layers=2)
    expected = singles(tmp_path / "made", model, shared=shared, names=names)
    for shapes in (shapes_of(model), None):
        source = open_source(tmp_path / "made", shapes)
        check(source, expected)
        assert {c.r for n, c in source.changes.items() if "gate_up" in n} == {4 if shared else 8}
    gone = f"layers.1.mlp.experts.5.{names[1]}.lora_"
    rewrite(tmp_path / "made", lambda tensors: [tensors.pop(name) for name in list(tensors) if gone in name])
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.gate_up_proj must have .* 12 experts; missing: 5.up"):
        open_source(tmp_path / "made", shapes_of(model))


def refused(folder: Path, text: str, shapes: Any = None) -> None:
    with pytest.raises(ValueError, match=text):
        open_source(folder, shapes)


def test_unknown_content_is_refused_by_name(tmp_path: Path) -> None:
    model = wrapped()
    q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    experts = "base_model.model.model.language_model.layers.0.mlp.experts"
    refused(tmp_path, "holds no adapter: adapter_model.safetensors is missing$")
    (tmp_path / "adapter_model.bin").touch()
    refused(tmp_path, "adapter_model.bin is not supported, convert it")
    saved(model, tmp_path / "adapter")
    refused(tmp_path, "; .*adapter has one")
    for number, (text, change) in enumerate(
        {
            "q_proj has only lora_A; the file is incomplete": lambda t: t.pop(f"{q}.lora_B.weight"),
            "is not a plain low-rank factor": lambda t: t.update({f"{q}.lora_magnitude_vector": torch.ones(3)}),
            r"q_proj has lora_A F32 \[4, 48\] and lora_B F32 \[128, 3\]; they": lambda t: t.update(
                {f"{q}.lora_B.weight": torch.ones(128, 3)}
            ),
            "q_proj.weight has rank 5, but adapter_config.json says 4": lambda t: t.update(
                {f"{q}.lora_A.weight": torch.ones(5, 48), f"{q}.lora_B.weight": torch.ones(128, 5)}
            ),
            r"q_proj.weight of shape \[128, 40\], but this base has \[128, 48\]": lambda t: t.update(
                {f"{q}.lora_A.weight": torch.ones(4, 40)}
            ),
            "changes nowhere.weight, which this base does not have. The": lambda t: t.update(
                {"nowhere.weight": torch.ones(3)}
            ),
            "F64; it must be one of F32, BF16, F16": lambda t: t.update(
                {f"{q}.lora_A.weight": torch.ones(4, 48).double(), f"{q}.lora_B.weight": torch.ones(128, 4).double()}
            ),
            "gate_up_proj has 47 rows in lora_A; with r 4 .* not 12 experts": lambda t: t.update(
                {
                    f"{experts}.base_layer.lora_A.weight": torch.ones(47, 48),
                    f"{experts}.base_layer.lora_B.weight": torch.ones(80, 47),
                }
            ),
            "gate_up_proj is changed twice, in two forms": lambda t: t.update(
                {f"{experts}.0.gate_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
            ),
        }.items()
    ):
        rewrite(saved(model, tmp_path / str(number)), change)
        refused(tmp_path / str(number), text, shapes_of(model))
    for number, (text, values) in enumerate(
        {
            "peft_type is LOHA; only LORA is supported": {"peft_type": "LOHA"},
            "use_dora is True; only plain LoRA": {"use_dora": True},
            "init_lora_weights is 'pissa_niter_4', which changed the base": {"init_lora_weights": "pissa_niter_4"},
        }.items()
    ):
        edit(saved(model, tmp_path / f"config {number}"), **values)
        refused(tmp_path / f"config {number}", text)
    rewrite(saved(model, tmp_path / "empty"), dict.clear)
    refused(tmp_path / "empty", "changes nothing: adapter_model.safetensors holds no tensor")


def test_a_separate_head_does_not_fit_a_tied_base(tmp_path: Path) -> None:
    model = wrapped()
    rewrite(saved(model, tmp_path), lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(176, 48)}))
    shapes = shapes_of(model)
    assert set(open_source(tmp_path, shapes).full) == {"lm_head.weight"}
    tied = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    refused(tmp_path, r"lm_head.weight, which this base does not have \(it ties its head", tied)


def test_experts_of_several_kinds_and_a_square_stack(tmp_path: Path) -> None:
    model = vl_model(layers=1)
    singles(tmp_path / "made", model, shared=True, names=("gate_proj", "up_proj", "down_proj"))
    stem = "base_model.model.model.language_model.layers.0.mlp.experts.3.down_proj.lora_"

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors[f"{stem}A.weight"] = tensors[f"{stem}A.weight"][:, :5]

    edit(tmp_path / "made", alpha_pattern={r".*\.3\.down_proj": 9})
    refused(tmp_path / "made", "down_proj have several scales or types")
    edit(tmp_path / "made", alpha_pattern={})
    rewrite(tmp_path / "made", narrow)
    refused(tmp_path / "made", "experts of .*down_proj differ in their dimensions")
    square = vl_model(layers=2, hidden=80)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    folder = saved(wrapped(hidden=80), tmp_path / "square")
    rewrite(folder, lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(12, 80, 80)}))
    refused(folder, r"gate_up_proj \[12, 80, 80\] has the same shape transposed, and no metadata", shapes_of(square))


def test_full_modules_have_peft_s_names_and_values(tmp_path: Path) -> None:
    model = vl_model(layers=1)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "language_model.norm"])
    model_in_peft = get_peft_model(model, config)
    model_in_peft.base_model.model.lm_head.modules_to_save["default"].weight.data.fill_(2.0)
    model_in_peft.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert set(source.full) == {"lm_head.weight", "model.language_model.norm.weight"}
    assert bool((source.read_full("lm_head.weight") == 2.0).all())
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert len(list(file.keys())) == 2 * len(source.changes) + len(source.full)

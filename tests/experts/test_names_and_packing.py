"""Ownership, groups, orientations, names and PEFT's packing, each against the code they must agree with."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_moe import text_model, vl_model
from transformers import Qwen3MoeForCausalLM, Qwen3VLMoeForConditionalGeneration

from moe import names, packing
from moe import placement as layout

SHAPE = layout.ExpertShape(experts=6, hidden=32, intermediate=24)


@given(local=st.integers(1, 9), ep=st.integers(1, 9))
def test_every_expert_has_one_owner_and_blocks_are_contiguous(local: int, ep: int) -> None:
    owned = [layout.expert_range(num_experts=local * ep, ep=ep, ep_rank=rank) for rank in range(ep)]
    assert [expert for block in owned for expert in block] == list(range(local * ep))
    for rank, block in enumerate(owned):
        assert {layout.expert_owner(expert, num_experts=local * ep, ep=ep) for expert in block} == {rank}


@pytest.mark.parametrize("options", [{}, {"mp_size": 2, "mp_mode": "sp"}], ids=["plain", "beside sequence groups"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 1), (4, 2), (4, 4), (12, 3), (16, 8)])
def test_groups_are_those_the_engine_builds(monkeypatch, world: int, ep: int, options: dict[str, Any]) -> None:
    from deepspeed.utils import groups

    for rank in range(world):
        # the engine's own arithmetic, without the processes: a group is its ranks
        answers = {"get_world_size": world, "get_rank": rank, "is_initialized": True}
        fake = SimpleNamespace(**{name: partial(int, value) for name, value in answers.items()}, new_group=list)
        monkeypatch.setattr(groups, "dist", fake)
        for name in ("", "_RANKS"):
            monkeypatch.setattr(groups, f"_EXPERT_PARALLEL_GROUP{name}", {})
            monkeypatch.setattr(groups, f"_EXPERT_DATA_PARALLEL_GROUP{name}", {})
        groups._create_expert_and_data_parallel(ep, **options)
        (experts,) = groups._EXPERT_PARALLEL_GROUP.values()
        (data,) = groups._EXPERT_DATA_PARALLEL_GROUP.values()
        assert [group for group in layout.expert_groups(world_size=world, ep=ep) if rank in group] == [tuple(experts)]
        assert [group for group in layout.expert_data_groups(world_size=world, ep=ep) if rank in group] == [tuple(data)]


@pytest.mark.parametrize(
    ("experts", "world", "ep", "allowed"),
    [(8, 4, 3, "1, 2, 4"), (6, 8, 4, "1, 2"), (9, 4, 2, "1"), (8, 4, 0, "1, 2, 4")],
)
def test_ep_must_divide_ranks_and_experts(experts: int, world: int, ep: int, allowed: str) -> None:
    with pytest.raises(
        ValueError, match=f"parallel.ep: {ep} must .* {world} ranks .* {experts} experts; one of {allowed} does"
    ):
        layout.check_ep(num_experts=experts, world_size=world, ep=ep)


def test_ep_that_divides_both_passes() -> None:
    layout.check_ep(num_experts=12, world_size=8, ep=4)


def test_layout_is_told_from_both_tensors_even_where_one_of_them_fits_both() -> None:
    square_up = layout.ExpertShape(experts=4, hidden=48, intermediate=24)  # gate_up is square
    square_down = layout.ExpertShape(experts=4, hidden=24, intermediate=24)  # down is square
    for shape in (SHAPE, square_up, square_down):
        for name in layout.LAYOUTS:
            assert layout.fused_layout("layer", *shape.fused(name), shape=shape) == name


def test_wrong_layouts_are_refused_with_what_was_found() -> None:
    layout.check_fused("layers.3", (6, 32, 48), (6, 24, 32), shape=SHAPE, layout="hub")
    with pytest.raises(
        ValueError, match=r"layers\.3: 6 experts .* have transformers layout when .* which is hub layout"
    ):
        layout.check_fused("layers.3", (6, 32, 48), (6, 24, 32), shape=SHAPE, layout="transformers")
    with pytest.raises(ValueError, match=r"found gate_up \[6, 32, 48\] and down \[6, 32, 24\]$"):
        layout.check_fused("layers.3", (6, 32, 48), (6, 32, 24), shape=SHAPE, layout="hub")
    with pytest.raises(
        ValueError, match=r"layers\.3: .* in hub layout and .* in transformers layout; found gate_up \[6, 1"
    ):
        layout.fused_layout("layers.3", (6, 1, 2), (6, 24, 32), shape=SHAPE)


def ours_of(model: torch.nn.Module, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    experts = model.get_submodule(f"{prefix}0.mlp.experts")
    return experts.gate_up_proj.detach(), experts.down_proj.detach()


def test_hub_layout_is_what_transformers_reads(tmp_path) -> None:
    model = vl_model(experts=8)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key in [key for key in state if key.endswith("gate_up_proj")]:
        other = key.replace("gate_up_proj", "down_proj")
        gate_up, down = packing.ours_to_fused(state[key], state[other], "hub")
        layout.check_fused(key, gate_up.shape, down.shape, shape=SIZES, layout="hub")
        state[key], state[other] = gate_up.contiguous(), down.contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)
    prefix = names.LAYERS["qwen3_vl_moe"]
    for read, written in zip(ours_of(again, prefix), ours_of(model, prefix), strict=True):
        torch.testing.assert_close(read, written, rtol=0, atol=0)
    gate_up, down = ours_of(model, prefix)
    back = packing.fused_to_ours(*packing.ours_to_fused(gate_up, down, "hub"), "hub")
    assert torch.equal(back[0], gate_up)
    assert torch.equal(back[1], down)
    assert packing.ours_to_fused(gate_up, down, "transformers") == (gate_up, down)


SIZES = layout.ExpertShape(experts=8, hidden=48, intermediate=40)


def test_per_expert_tensors_are_what_transformers_reads(tmp_path) -> None:
    model = text_model(num_experts=8)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    fused = {key: value for key, value in model.state_dict().items() if key.endswith(("gate_up_proj", "down_proj"))}
    prefix = names.LAYERS["qwen3_moe"]
    state = {key: value for key, value in state.items() if ".mlp.experts." not in key}
    for number in range(3):
        keys = [f"{prefix}{number}.mlp.experts.{tensor}" for tensor in ("gate_up_proj", "down_proj")]
        gates, ups, downs = packing.ours_to_per_expert(fused[keys[0]], fused[keys[1]])
        for expert in range(8):
            gate, up = names.per_expert_names("qwen3_moe", keys[0], expert)
            (down,) = names.per_expert_names("qwen3_moe", keys[1], expert)
            state |= {gate: gates[expert].clone(), up: ups[expert].clone(), down: downs[expert].clone()}
        again = packing.per_expert_to_ours(gates, ups, downs)
        assert torch.equal(again[0], fused[keys[0]])
        assert torch.equal(again[1], fused[keys[1]])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
OURS = [
    "experts.gate_up_lora_A", "experts.gate_up_lora_B", "experts.down_lora_A", "experts.down_lora_B",
    "gate.lora_A", "gate.lora_B",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_moe"])
def test_names_are_those_of_transformers_and_peft(kind: str) -> None:
    model = vl_model(experts=8) if kind == "qwen3_vl_moe" else text_model(num_experts=8)
    prefix = names.LAYERS[kind]
    blocks = [f"{prefix}{number}.mlp." for number in range(model.config.get_text_config().num_hidden_layers)]
    base_keys = set(model.state_dict())
    dense = [key for key in base_keys if ".mlp.experts." not in key and ".mlp.gate." not in key]
    config = LoraConfig(r=4, target_modules=r".*\.q_proj", target_parameters=PARAMETERS)
    peft_model = get_peft_model(model, config)
    attention = [key for key in peft_model.state_dict() if "q_proj" in key]
    assert any("base_layer" in key for key in attention)
    ours = [name for name in dense if "q_proj" not in name] + attention
    ours += [block + tensor for block in blocks for tensor in ["experts.gate_up", "experts.down", "gate.weight", *OURS]]

    mapping = names.name_map(kind, ours)
    assert len(mapping.to_canonical) == len(mapping.to_ours) == len(ours)
    assert set(mapping.to_ours) == base_keys | set(get_peft_model_state_dict(peft_model))
    for name, canonical in mapping.to_canonical.items():
        assert mapping.to_ours[canonical] == name
        ours_again = names.our_moe_name(kind, canonical)
        assert ours_again == (name if ".mlp.experts." in name or ".mlp.gate." in name else None)


def test_names_refuse_what_they_do_not_know() -> None:
    block = "model.language_model.layers.1.mlp."
    with pytest.raises(
        ValueError, match="model type 'mixtral' has no experts known here; known: qwen3_vl_moe, qwen3_moe"
    ):
        names.canonical_name("mixtral", "model.layers.0.mlp.experts.gate_up")
    with pytest.raises(ValueError, match=r"a sparse block of qwen3_vl_moe has no tensor 'gate\.base_weight' here"):
        names.canonical_name("qwen3_vl_moe", f"{block}gate.base_weight")
    with pytest.raises(ValueError, match="adapter 'other', but 'default' is the one that is trained"):
        names.canonical_name("qwen3_vl_moe", "model.language_model.layers.0.self_attn.q_proj.lora_A.other.weight")
    with pytest.raises(ValueError, match=r"q\.weight and .*q\.base_layer\.weight are both .*q\.weight|are both"):
        names.name_map("qwen3_moe", ["model.norm.weight", "model.norm.base_layer.weight"])
    for wrong in (
        f"{block}experts.gate_proj",
        f"{block}experts.lora_A.weight",
        names.PEFT_PREFIX + f"{block}gate.weight",
    ):
        with pytest.raises(
            ValueError, match="not a tensor of a qwen3_vl_moe sparse block, which has experts.gate_up_proj"
        ):
            names.our_moe_name("qwen3_vl_moe", wrong)
    with pytest.raises(ValueError, match="not a fused expert tensor"):
        names.per_expert_names("qwen3_vl_moe", f"{block}gate.weight", 0)


def test_lora_packing_gives_the_delta_that_peft_computes() -> None:
    experts, r = 8, 4
    model = get_peft_model(
        vl_model(experts=8), LoraConfig(r=r, lora_alpha=12, target_modules=[], target_parameters=PARAMETERS[:2])
    )
    wrapper = model.base_model.model.model.language_model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate_up_proj": (48, 80), "down_proj": (40, 48)}
    for layer in (wrapper, wrapper.base_layer):
        inside, outside = sizes[layer.parameter_name]
        a = torch.randn(experts, r, inside, generator=generator)
        b = torch.randn(experts, outside, r, generator=generator)
        file_a, file_b = packing.pack_lora(a, b)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(file_a)
            layer.lora_B["default"].weight.copy_(file_b)
        torch.testing.assert_close(layer.get_delta_weight("default"), 3.0 * (b @ a), rtol=1e-6, atol=1e-5)
        again = packing.unpack_lora("layer", file_a, file_b, experts=experts)
        assert torch.equal(again[0], a)
        assert torch.equal(again[1], b)


def test_lora_of_another_number_of_experts_is_refused() -> None:
    a, b = torch.zeros(12, 5), torch.zeros(7, 12)
    for bad in ((a, b, 5), (a, b[:, :6], 4), (a[None], b, 4)):
        with pytest.raises(ValueError, match=r"layer: lora_A .* are not the factors of . experts"):
            packing.unpack_lora("layer", bad[0], bad[1], experts=bad[2])


def test_no_torch_is_needed_for_plans() -> None:
    import subprocess
    import sys

    code = "import sys, moe.placement, moe.names; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.strip().lower()) is False

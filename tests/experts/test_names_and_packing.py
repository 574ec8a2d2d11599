"""Ownership, groups, names and PEFT's packing, each against the code it must agree with."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny_moe import text_model, vl_model

from moe import names, packing, placement


@given(local=st.integers(1, 9), ep=st.integers(1, 9))
def test_every_expert_has_one_owner_and_blocks_are_contiguous(local: int, ep: int) -> None:
    owned = [placement.expert_range(num_experts=local * ep, ep=ep, ep_rank=rank) for rank in range(ep)]
    assert [expert for block in owned for expert in block] == list(range(local * ep))
    assert {len(block) for block in owned} == {local}


@pytest.mark.parametrize("options", [{}, {"mp_size": 2, "mp_mode": "sp"}], ids=["plain", "with sequence groups"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 1), (4, 2), (4, 4), (12, 3), (16, 8)])
def test_groups_are_the_ones_that_the_engine_builds(monkeypatch, world: int, ep: int, options: dict[str, Any]) -> None:
    from deepspeed.utils import groups

    for rank in range(world):
        # the engine's own arithmetic without processes: a group is the list of its ranks
        answers = {"get_world_size": world, "get_rank": rank, "is_initialized": True}
        fake = SimpleNamespace(**{name: partial(int, value) for name, value in answers.items()}, new_group=list)
        monkeypatch.setattr(groups, "dist", fake)
        for name in ("", "_RANKS"):
            monkeypatch.setattr(groups, f"_EXPERT_PARALLEL_GROUP{name}", {})
            monkeypatch.setattr(groups, f"_EXPERT_DATA_PARALLEL_GROUP{name}", {})
        groups._create_expert_and_data_parallel(ep, **options)
        (experts,) = groups._EXPERT_PARALLEL_GROUP.values()
        (data,) = groups._EXPERT_DATA_PARALLEL_GROUP.values()
        first = rank // ep * ep
        assert list(experts) == list(range(first, first + ep)), "neighbours exchange tokens"
        assert list(data) == list(range(rank % ep, world, ep)), "ranks at equal places hold the same experts"


@pytest.mark.parametrize(
    ("experts", "world", "ep", "allowed"),
    [(8, 4, 3, "1, 2, 4"), (6, 8, 4, "1, 2"), (9, 4, 2, "1"), (8, 4, 0, "1, 2, 4")],
)
def test_ep_must_divide_ranks_and_experts(experts: int, world: int, ep: int, allowed: str) -> None:
    with pytest.raises(
        ValueError, match=f"parallel.ep: {ep} must .* {world} ranks .* {experts} experts; use one of {allowed}"
    ):
        placement.check_ep(num_experts=experts, world_size=world, ep=ep)


def test_ep_that_divides_both_passes() -> None:
    placement.check_ep(num_experts=12, world_size=8, ep=4)


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
OURS = [f"{stack}_lora_{side}" for stack in ("experts.gate_up", "experts.down") for side in "AB"]
OURS += ["gate.lora_A", "gate.lora_B"]


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_moe"])
def test_names_match_transformers_and_peft(kind: str) -> None:
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

    canonical = [names.canonical_name(kind, name) for name in ours]
    assert len(set(canonical)) == len(ours)
    assert set(canonical) == base_keys | set(get_peft_model_state_dict(peft_model))


def test_unknown_names_are_refused() -> None:
    block = "model.language_model.layers.1.mlp."
    with pytest.raises(
        ValueError, match="model type 'mixtral' is not supported here; it must be one of qwen3_vl_moe, qwen3_moe"
    ):
        names.canonical_name("mixtral", "model.layers.0.mlp.experts.gate_up")
    with pytest.raises(ValueError, match=r"a sparse block of qwen3_vl_moe has no tensor 'gate\.base_weight'; it has"):
        names.canonical_name("qwen3_vl_moe", f"{block}gate.base_weight")
    with pytest.raises(ValueError, match="adapter 'other', but adapter 'default' is the one being trained"):
        names.canonical_name("qwen3_vl_moe", "model.language_model.layers.0.self_attn.q_proj.lora_A.other.weight")


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


def test_placement_and_names_load_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, moe.placement, moe.names; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.strip().lower()) is False

"""Replacing a model's sparse blocks on one rank: the same function, exactly the expected blocks, clear errors."""

import copy
import re
from typing import Any

import pytest
import torch
from tiny_moe import LORA, batch, rows_of, text_model, vl_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetune.architecture.rank_shares import choose_resident
from finetune.model.recompute import set_recompute
from finetune.model.resident import frozen_bytes, make_resident
from moe.dispatch import _orders
from moe.parallel import ExpertParallelMoe, LayerOptions, describe, replace_moe_blocks, sparse_layers
from moe.router import RouterOptions

VL_LAYERS = [f"model.language_model.layers.{n}.mlp" for n in range(2)]


def replaced(model: Any, **options: Any) -> Any:
    model = copy.deepcopy(model)
    replace_moe_blocks(model, ep_size=1, options=LayerOptions(**options))
    return model


def test_a_replaced_vision_language_model_is_the_same_function() -> None:
    model, data = vl_model().eval(), rows_of(batch(), slice(None))
    for options in ({}, {"resident": False}, {"experts": "lora", "lora": LORA}):
        with torch.no_grad():
            torch.testing.assert_close(replaced(model, **options)(**data).logits, model(**data).logits)


@pytest.mark.parametrize(
    "config",
    [{}, {"norm_topk_prob": False}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 2]}],
    ids=["all", "not normalised", "every second", "two dense"],
)
def test_a_replaced_text_model_is_the_same_function(config: dict[str, Any]) -> None:
    model, ids = text_model(**config).eval(), batch()["input_ids"]
    ours = replaced(model)
    layers = [name for name, module in ours.named_modules() if isinstance(module, ExpertParallelMoe)]
    assert layers == [f"model.layers.{n}.mlp" for n in sparse_layers(model.config)]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits)


def test_bfloat16_scores_are_cast_as_in_transformers() -> None:
    model = vl_model().bfloat16()
    block = model.model.language_model.layers[0].mlp
    ours = replaced(model).model.language_model.layers[0].mlp
    x = torch.randn(2, 60, 48, dtype=torch.bfloat16)
    expected = block(x)
    assert (ours(x) - expected).float().norm() < 4e-3 * expected.float().norm()


def test_a_float32_gate_scores_exactly_in_a_bfloat16_model() -> None:
    model = vl_model().bfloat16()
    layer = replaced(model, router=RouterOptions(float32=True)).model.language_model.layers[0].mlp
    x = torch.randn(60, 48, dtype=torch.bfloat16)
    logits, _ = layer.gate(x, 2)
    assert layer.gate.weight.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, x.float() @ layer.gate.weight.T)


def test_on_meta_only_shapes_are_made() -> None:
    with torch.device("meta"):
        model = vl_model()
    layers = replace_moe_blocks(model, ep_size=1, options=LayerOptions(experts="lora", lora=LORA))
    assert [layer.name for layer in layers] == VL_LAYERS
    assert describe(layers) == (
        "2 sparse blocks: 12 experts, 12 per rank (ep 1), lora r 8, router frozen, frozen weights resident, "
        "rows by all_to_all, grouped_mm"
    )
    assert all(tensor.is_meta for layer in layers for tensor in [*layer.parameters(), *layer.buffers()])
    assert [tuple(p.shape) for p in layers[0].parameters()] == [(12, 8, 48), (12, 80, 8), (12, 8, 40), (12, 48, 8)]


def test_a_layer_works_without_any_token() -> None:
    layer = replaced(vl_model(), experts="lora", lora=LORA, router=RouterOptions(mode="full")).model.language_model
    layer = layer.layers[0].mlp
    x = torch.empty(0, 48, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters() if p.requires_grad)


def test_the_local_order_undoes_itself() -> None:
    counts_SL = torch.tensor([[2, 0, 3], [0, 0, 0], [1, 4, 0], [0, 2, 2]])
    by_expert, by_source = _orders(counts_SL, int(counts_SL.sum()))
    experts = torch.arange(3).repeat(4).repeat_interleave(counts_SL.flatten())
    assert torch.equal(by_expert, experts.argsort(stable=True))
    assert torch.equal(by_expert[by_source], torch.arange(14))


class Other(nn.Module):
    pass


def broken(**changes: Any) -> Any:
    model = text_model()
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


def twice() -> Any:
    return replaced(text_model())


def dense() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Other, "model type 'Other' has no expert-parallel layer here; it must be one of qwen3_moe, qwen3_vl_moe. A "),
        (dense, "model type 'qwen3' has no expert-parallel layer here; it must be one of qwen3_moe, qwen3_vl_moe"),
        (
            lambda: broken(decoder_sparse_step=2),
            "has 1 sparse blocks (model.layers.1.mlp), but 3 were found (model.layers.0.mlp, model.layers.1.mlp,",
        ),
        (lambda: broken(num_hidden_layers=5), "has 5 sparse blocks (model.layers.0.mlp, model.layers.1.mlp, ..., "),
        (lambda: broken(num_experts=0), "has 0 sparse blocks (none), but 3 were found"),
        (twice, "model.layers.1.mlp, model.layers.2.mlp), but 0 were found (none), and 3 are already replaced"),
        (lambda: broken(hidden_act="gelu"), "experts compute SwiGLU, but the config's hidden_act is 'gelu'"),
    ],
)
def test_a_model_other_than_expected_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace_moe_blocks(make(), ep_size=1, options=LayerOptions())


@pytest.mark.parametrize(
    ("ep", "options", "message"),
    [
        (5, {}, "parallel.ep: 5 must divide both the 1 ranks and the 12 experts"),
        (1, {"dispatch": "pigeon"}, "moe.dispatch must be one of all_to_all, deepep, got 'pigeon'"),
        (
            1,
            {"dispatch": "deepep"},
            "moe.dispatch: deepep cannot be used: the package deep_ep is not installed; no CUDA device is visible; "
            "parallel.ep is 1, so there is nothing to exchange; the model is float32, but DeepEP moves bfloat16 only; "
            "the largest number of tokens in a micro-batch is not known",
        ),
    ],
)
def test_impossible_options_are_refused(ep: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace_moe_blocks(text_model(), ep_size=ep, options=LayerOptions(**options))


def test_router_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"moe\.router\.mode must be one of frozen, lora, full, got 'some'"):
        RouterOptions(mode="some")  # type: ignore[arg-type]  # what a user may write
    with pytest.raises(ValueError, match=r"moe\.router\.r must be at least 1 in mode lora, got 0"):
        RouterOptions(mode="lora", r=0)


def test_recompute_is_set_in_layers_but_not_in_a_frozen_tower() -> None:
    model = replaced(vl_model())
    layers = [model.model.language_model.layers[0], model.model.visual.blocks[0]]
    set_recompute(model, "layer")
    assert [layer.gradient_checkpointing for layer in layers] == [True, True]
    model.model.visual.requires_grad_(False)
    set_recompute(model, "selective")
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert not model.get_input_embeddings()(torch.tensor([[1]])).detach().requires_grad
    set_recompute(model, "none")
    assert [layer.gradient_checkpointing for layer in layers] == [False, False]


def test_impossible_recompute_modes_are_refused() -> None:
    model = replaced(vl_model())
    with pytest.raises(ValueError, match=r"parallel\.recompute must be one of none, layer, selective, got 'all'"):
        set_recompute(model, "all")  # type: ignore[arg-type]  # what a user may write
    layer = model.model.language_model.layers[0].mlp
    layer.options = LayerOptions(dispatch="deepep")
    with pytest.raises(ValueError, match="selective keeps the rows that the all-to-all received, but moe.dispatch: d"):
        set_recompute(model, "selective")


def test_resident_weights_become_buffers_and_names_and_function_stay_the_same() -> None:
    model, data = vl_model().eval(), rows_of(batch(), slice(None))
    model.requires_grad_(False)
    model.model.language_model.norm.weight.requires_grad_(True)
    expected, keys, weight = model(**data).logits, list(model.state_dict()), frozen_bytes(model)
    made = make_resident(model)
    assert sorted(model.state_dict()) == sorted(keys)
    assert [name for name, _ in model.named_parameters()] == ["model.language_model.norm.weight"]
    assert len(made) == len(keys) - 1
    assert weight == sum(b.nbytes for name, b in model.named_buffers() if name in keys)
    assert torch.equal(model(**data).logits, expected)
    # transformers reads both from a model's first parameter, of which the tower has none left
    assert (model.model.visual.dtype, model.model.visual.device.type) == (torch.float32, "cpu")
    assert type(model.model.visual).__name__ == "Qwen3VLMoeVisionModel"
    assert make_resident(model) == []


def test_tied_weights_stay_tied_when_resident() -> None:
    model = text_model(tie_word_embeddings=True).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    make_resident(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("choice", "needed", "resident"),
    [("auto", 95, True), ("auto", 96, False), ("frozen", 1000, True), ("none", 1, False)],
)
def test_resident_is_chosen_if_the_weights_fit(choice: Any, needed: int, resident: bool) -> None:
    chosen = choose_resident(choice, needed_bytes=lambda: needed * 10**9, room_bytes=100 * 10**9)
    assert chosen.resident is resident
    assert choice in chosen.reason


def test_an_unknown_resident_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.resident must be one of auto, frozen, none, got 'some'"):
        choose_resident("some", needed_bytes=lambda: 1, room_bytes=2)  # type: ignore[arg-type]  # what a user may write

"""A decoder's small operations as single nodes: results and gradients equal transformers' and PEFT's bit for bit."""

import copy
from functools import partial
from inspect import signature

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_moe import text_model, vl_model
from torch import nn
from transformers import DynamicCache

from finetune.model.lora import adapters_off
from finetune.model.nodes import CACHES, Attention, DenseLora, Norm, join_nodes
from finetune.model.varlen import register

TOKENS, BORDERS = 23, (0, 9, 10, 23)  # one of the samples has a single token


def _layer(kind, dtype: torch.dtype, *, attention: str = "lora", norms: bool = False):
    """Return a decoder layer of transformers with PEFT's LoRA, and its rotary positions."""
    register()
    model = kind()
    inner = getattr(model.model, "language_model", model.model)
    model.config.get_text_config()._attn_implementation = "segments"
    layer = inner.layers[0].to(dtype).train()
    layer.mlp = nn.Linear(48, 48, dtype=dtype)
    layer.requires_grad_(False)
    if attention == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp"]
        options = LoraConfig(r=8, lora_alpha=12, target_modules=names)
        layer = inject_adapter_in_model(options, layer)
        for name, factor in layer.named_parameters():
            if "lora_" in name:
                nn.init.normal_(factor, std=0.2)
                factor.data = factor.data.to(dtype)
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        if norms and "norm" in name:
            parameter.requires_grad_()
    return layer, inner.rotary_emb


def _run(layer, rotary, dtype: torch.dtype, around=None, **others):
    """Return the output, and the gradients of the input and of all trainable parameters."""
    generator = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(1, TOKENS, 48, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    places = torch.arange(TOKENS)[None]
    cuts = {"cu_seq_lens_q": torch.tensor(BORDERS, dtype=torch.int32), "borders": BORDERS}
    given = {"attention_mask": None, "position_embeddings": rotary(x.detach(), places), **cuts, **others}
    run = partial(layer, **given)
    y = run(2 * x) if around is None else around(run, 2 * x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(grad)
    found = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad(set_to_none=True)
    return {"y": y.detach(), "x": x.grad, **found}


def _same(mine, theirs) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("attention", "norms"), [("lora", False), ("lora", True), ("frozen", True)])
@pytest.mark.parametrize("kind", [vl_model, text_model], ids=["vl", "text"])
def test_a_layer_of_nodes_computes_the_same_as_the_chains(
    kind, attention: str, norms: bool, dtype: torch.dtype
) -> None:
    layer, rotary = _layer(kind, dtype, attention=attention, norms=norms)
    joined = copy.deepcopy(layer)
    join_nodes(joined)
    kinds = [type(module) for module in joined.modules()]
    assert (kinds.count(Norm), kinds.count(Attention)) == (4, 1)
    assert kinds.count(DenseLora) == (5 if attention == "lora" else 0)
    saved = {"chains": 0, "nodes": 0}

    def count(what: str, run, x):
        def note(tensor):
            saved[what] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return run(x)

    theirs = _run(layer, rotary, dtype, partial(count, "chains"))
    _same(_run(joined, rotary, dtype, partial(count, "nodes")), theirs)
    assert saved["nodes"] < 0.6 * saved["chains"]


def test_calls_that_the_nodes_do_not_cover_go_to_transformers_and_peft() -> None:
    layer, rotary = _layer(vl_model, torch.float32)
    joined = copy.deepcopy(layer)
    join_nodes(joined)
    with adapters_off(layer), adapters_off(joined), torch.no_grad():
        given = {"position_embeddings": rotary(torch.zeros(1, 3, 48), torch.arange(3)[None]), "attention_mask": None}
        x, caches = torch.randn(1, 3, 48), [DynamicCache(), DynamicCache()]
        cuts = {"cu_seq_lens_q": torch.tensor([0, 3]), "borders": (0, 3)}
        (name,) = signature(layer.self_attn.forward).parameters.keys() & set(CACHES)  # the installed version's
        theirs, mine = (
            one(x, **given, **cuts, **{name: cache}) for one, cache in zip((layer, joined), caches, strict=True)
        )
        assert torch.equal(mine, theirs)
    lengths = [cache.get_seq_length() for cache in caches]
    assert lengths == [3, 3]


@pytest.mark.parametrize("kind_of_hook", ["register_forward_pre_hook", "register_forward_hook"])
def test_modules_with_hooks_are_called_as_the_engine_and_a_replay_need(kind_of_hook: str) -> None:
    layer, rotary = _layer(vl_model, torch.float32)
    joined = copy.deepcopy(layer)
    join_nodes(joined)
    called = []
    for module in joined.modules():
        if isinstance(module, DenseLora):
            getattr(module.lora_B["default"], kind_of_hook)(lambda *_: called.append("factor"))
    getattr(joined.self_attn.q_norm, kind_of_hook)(lambda *_: called.append("norm"))
    _same(_run(joined, rotary, torch.float32), _run(layer, rotary, torch.float32))
    assert called.count("factor") == 5
    assert called.count("norm") == 1

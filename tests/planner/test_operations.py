"""Compares the operations that the planner counts with those that the real modules run on the meta device."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLMoeConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionBlock, Qwen3VLMoeVisionPatchMerger

from benchmarks.device.launches import figures
from benchmarks.device.meta_layer import MetaLayer
from benchmarks.device.operations import Operations
from finetune.architecture.families import Experts, Family, Text, Vision, family
from finetune.config import (
    LOSS_TILE_BYTES,
    AdaptersConfig,
    DensePartConfig,
    ExpertPartConfig,
    RouterPartConfig,
)
from finetune.model.loss import TiledHead
from finetune.model.nodes import join_nodes
from finetune.planner.activations import Rows
from finetune.planner.gpus import gpu
from finetune.planner.layer import decoder_layer, head
from finetune.planner.operations import Op, mm, spent
from finetune.planner.tower import block, merger

WITHIN = 0.02
"""Relative tolerance for the bytes of each kind; numbers of operations must be equal, and so must products' FLOPs."""
SMALL = Text(
    hidden_size=320,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=48,
    experts=Experts(num_experts=24, num_experts_per_tok=5, moe_intermediate_size=112),
)
REAL = family("qwen3-vl-30b-a3b").text
TOWER = Vision(out_hidden_size=320, hidden_size=192, intermediate_size=400, num_heads=6, depth=2)
ONCE = "flash_in_one_call"  # transformers passes cu_seqlens to attention functions whose name contains "flash"


def _base(text: Text = SMALL) -> Family:
    return Family(name="small", text=text, vision=TOWER)


def _same(counted: Operations, ops: Iterable[Op]) -> None:
    """Assert equal operations, bytes and FLOPs for every kind; the FLOPs of attention are not counted."""
    ops = list(ops)
    for kind in {*counted.kinds, *(op.kind for op in ops)}:
        mine, here = [op for op in ops if op.kind == kind], counted.kinds[kind]
        assert sum(op.times for op in mine) == here.launches, kind
        assert sum(op.times * op.bytes for op in mine) == pytest.approx(here.bytes, rel=WITHIN, abs=2e5), kind
        if kind != "attention":
            assert sum(op.times * op.flops for op in mine) == pytest.approx(here.flops, rel=1e-3), kind


@pytest.mark.parametrize(
    ("text", "tokens", "modes", "resident", "balance", "recompute"),
    [
        (REAL, 4096, ("lora", "lora", "frozen"), True, "off", "layer"),
        (REAL, 8192, ("lora", "lora", "frozen"), True, "off", "selective"),  # two chunks of the experts' rows
        (REAL, 8192, ("lora", "lora", "frozen"), False, "off", "none"),
        (SMALL, 1000, ("full", "full", "full"), True, "off", "none"),
        (replace(SMALL, experts=None), 900, ("lora", "frozen", "frozen"), True, "off", "layer"),
        (SMALL, 700, ("frozen", "frozen", "lora"), True, "micro", "layer"),
    ],
    ids=["30b", "30b, two chunks", "30b, partitioned", "small, full", "dense", "small, router"],
)
def test_a_decoder_layer_runs_the_operations_that_the_planner_counts(text, tokens, modes, resident, balance, recompute):
    attention, experts, router = modes
    adapters = AdaptersConfig(
        attention=DensePartConfig(mode=attention),
        experts=ExpertPartConfig(mode=experts),
        router=RouterPartConfig(mode=router),
        mlp=DensePartConfig(mode=attention),
    )
    forward, backward = MetaLayer(text, adapters, resident=resident, balance=balance).count(tokens, recompute)
    arriving = tokens * text.experts.num_experts_per_tok if text.experts else 0
    rows = Rows(tokens=tokens, supervised=tokens, patches=0, arriving=arriving, itemsize=2)
    foreseen = decoder_layer(
        _base(text),
        adapters,
        rows,
        recompute,
        squares=tokens**2,
        sparse=text.experts is not None,
        resident=resident,
        balances=balance != "off",
    )
    _same(forward, foreseen.forward)
    _same(backward, [*foreseen.again, *foreseen.backward])


def _in_one_call(module: Any, query, key, value, attention_mask=None, *, cu_seq_lens_q, max_length_q, scaling, **_):
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
    return out[None], None


@pytest.mark.parametrize(
    ("mode", "recompute"), [("frozen", "layer"), ("lora", "none"), ("lora", "layer"), ("full", "layer")]
)
def test_the_tower_runs_the_operations_that_the_planner_counts(mode, recompute):
    patches = 1024
    ALL_ATTENTION_FUNCTIONS.register(ONCE, _in_one_call)
    sizes = {k: getattr(TOWER, k) for k in ("out_hidden_size", "hidden_size", "intermediate_size", "num_heads")}
    config = Qwen3VLMoeConfig(vision_config=sizes).vision_config
    config._attn_implementation = ONCE
    dense = DensePartConfig(mode=mode)
    adapters = AdaptersConfig(vision_blocks=dense, merger=dense)
    rows = Rows(tokens=1, supervised=0, patches=patches, arriving=0, itemsize=2)
    parts = [
        (Qwen3VLMoeVisionBlock(config), block(_base(), adapters, rows, recompute, frame_squares=patches**2)),
        *(
            (Qwen3VLMoeVisionPatchMerger(config, grouped), merger(_base(), dense, patches, 2, below=True))
            for grouped in (False, True)
        ),
    ]
    cuts, table = torch.zeros(2, dtype=torch.int32, device="meta"), torch.empty(patches, 32, device="meta")
    given = {"cu_seqlens": cuts, "max_seqlen": patches, "position_embeddings": (table, table)}
    for module, foreseen in parts:
        for parameter in module.parameters():
            parameter.requires_grad_(mode == "full")
        if mode == "lora":
            names = ["qkv", "proj", "linear_fc1", "linear_fc2"]
            inject_adapter_in_model(LoraConfig(r=dense.r, target_modules=names), module)
            join_nodes(module)
        module.to("meta", torch.bfloat16)
        x = torch.empty(patches, 192, dtype=torch.bfloat16, device="meta", requires_grad=mode != "frozen")
        blocks = isinstance(module, Qwen3VLMoeVisionBlock)
        again = {"use_reentrant": False, "preserve_rng_state": False}
        with Operations() as forward:
            if blocks and foreseen.again:
                y = checkpoint(module, x, **given, **again)
            else:
                y = module(x, **given if blocks else {})
        _same(forward, foreseen.forward)
        assert bool(foreseen.again) == (blocks and mode != "frozen" and recompute == "layer")
        if mode != "frozen":
            grad = torch.empty_like(y)
            with Operations() as backward:
                y.backward(grad)
            _same(backward, [*foreseen.again, *foreseen.backward])


@pytest.mark.parametrize("trained", [False, True])
def test_the_head_runs_the_operations_that_the_planner_counts(trained):
    tokens = 1000  # three full tiles and a smaller one
    with torch.device("meta"):
        module = TiledHead(SMALL.hidden_size, SMALL.vocab_size, bias=False, dtype=torch.bfloat16)
        hidden = torch.empty(tokens, SMALL.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        labels, weights = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
    module.tile_bytes = LOSS_TILE_BYTES
    module.weight.requires_grad_(trained)
    rows = Rows(tokens=2 * tokens, supervised=tokens, patches=0, arriving=0, itemsize=2)
    foreseen = head(_base(), rows, trained=trained, passes=True)
    with Operations() as forward:
        objective, _ = module(hidden, labels, weights)
    _same(forward, foreseen.forward)
    grad = torch.empty_like(objective)
    with Operations() as backward:
        objective.backward(grad)
    _same(backward, foreseen.backward)


def test_the_slowest_resource_decides_the_time_of_an_operation():
    h100 = gpu("h100-80gb")
    memory, compute = mm(4096, 2048, 16, 2), mm(8192, 8192, 8192, 2)
    seconds = spent([(memory, 1), (compute, 2), (mm(1, 1, 1, 2), 10)], h100, local_experts=1)
    assert seconds.limits == pytest.approx(
        {
            "memory": memory.bytes / (0.8 * 3.35e12),
            "compute": 2 * compute.flops / (0.63 * 989.4e12),
            "small kernels": 10 * 2.5e-6,
        }
    )
    assert seconds.launches == 13
    assert math.isclose(sum(seconds.kinds.values()), sum(seconds.limits.values()))


def test_without_a_grouped_kernel_each_expert_is_a_separate_product():
    grouped = [(Op("grouped_mm", 1e3, 1e3), 1)]
    for name, launches in (("a100-80gb", 16), ("h100-80gb", 1)):
        assert spent(grouped, gpu(name), local_experts=16).launches == launches


def test_launches_are_counted_for_our_modules_and_the_stock_ones():
    """All counts come from real modules; the stock ones rebuild the weights of every expert, as the bytes show."""
    by_pass = {figure.metric.rpartition(", ")[2]: figure for figure in figures(SMALL, (300,))}
    assert list(by_pass) == ["forward", "recompute", "backward", "all", "read and written"]
    every = by_pass["all"]
    for of in (lambda figure: figure.value, lambda figure: figure.peer.value):
        counts = [of(by_pass[name]) for name in ("forward", "recompute", "backward")]
        assert of(every) == sum(counts)
        assert min(counts) > 50
    assert by_pass["read and written"].ratio > 1

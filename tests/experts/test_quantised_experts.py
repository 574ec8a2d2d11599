"""Quantised experts compute what experts with the quantised values compute: outputs and gradients, in every mode."""

from typing import Any

import pytest
import torch
from expert_cases import CHUNKED, COUNTS, Checkpointed, made, rows_for, run, same

from moe.experts import GroupedExperts
from moe.kernels.linear import PackedLinear, Workspace
from moe.kernels.packed import Bits, Packing
from moe.recompute import contexts

BITS = ["int8", "nf4"]


def pair(mode: str, resident: bool, bits: Bits, **options: Any) -> tuple[GroupedExperts, GroupedExperts]:
    """Return quantised experts, and experts that hold the same values as they are."""
    packed, plain = made(mode, resident, bits=bits, **options), made(mode, resident, **options)
    with torch.no_grad():
        for key, packing in packed.packings.items():
            weight = getattr(plain, key)
            getattr(packed, key).copy_(packing.pack(weight, name=key))
            packing.unpack(getattr(packed, key), weight)
    return packed, plain


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["frozen", "lora"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("chunks", CHUNKED)
def test_equals_experts_with_the_same_values(bits: Bits, mode: str, resident: bool, chunks: str) -> None:
    packed, plain = pair(mode, resident, bits, **CHUNKED[chunks])
    for counts in COUNTS.values():
        rows = rows_for(plain, counts)
        same(run(packed, *rows), run(plain, *rows))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("recompute", ["layer", "selective"])
def test_recompute_unpacks_again(bits: Bits, recompute: Any) -> None:
    packed, plain = pair("lora", True, bits)
    rows = rows_for(plain, COUNTS["mixed"])
    found = run(Checkpointed(packed, contexts(recompute)), *rows)
    same({name.removeprefix("inner."): value for name, value in found.items()}, run(plain, *rows))


def test_dropout_and_the_base_alone() -> None:
    packed, plain = pair("lora", True, "int8")
    rows = rows_for(plain, COUNTS["mixed"])
    packed.is_adapted = plain.is_adapted = False
    assert torch.equal(packed(rows[0], rows[1]), plain(rows[0], rows[1]))
    packed.is_adapted = plain.is_adapted = True
    packed.lora = plain.lora = type(packed.lora)(r=packed.lora.r, alpha=6.0, dropout=0.5)
    results = []
    for module in (packed, plain):
        torch.manual_seed(0)
        results.append(run(module, *rows))
    same(*results)


def test_layers_share_one_workspace_in_bfloat16() -> None:
    """The memory is that of the largest layer, and the values are those of the layer that runs."""
    workspace = Workspace()
    pairs = [pair("lora", True, "nf4", dtype=torch.bfloat16, seed=seed, workspace=workspace) for seed in (1, 2)]
    x, counts, grad = rows_for(pairs[0][1], COUNTS["mixed"])
    results = []
    for side in (0, 1):
        x.grad = None
        for module in (pairs[0][side], pairs[1][side]):
            module.zero_grad()
        pairs[1][side](pairs[0][side](x, counts), counts).backward(grad)
        results.append([x.grad, *(p.grad for both in pairs for p in both[side].parameters() if p.requires_grad)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    largest = {key: 5 * (packing.out + 8) * packing.into for key, packing in pairs[0][0].packings.items()}
    largest["down"] = 5 * 32 * (24 + 8)
    held = {key[0]: memory.numel() for key, memory in workspace._memory.items()}
    assert held == largest


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_linear_layer_equals_its_values(bits: Bits) -> None:
    packing = Packing(bits=bits, out=24, into=20)
    generator = torch.Generator().manual_seed(3)
    weight, bias, x, grad = (torch.randn(shape, generator=generator) for shape in ((24, 20), (24,), (7, 20), (7, 24)))
    layer = PackedLinear(packing, torch.nn.Parameter(bias, requires_grad=False), Workspace())
    layer.weight = torch.nn.Parameter(packing.pack(weight[None], name="w"), requires_grad=False)
    values = packing.unpack(layer.weight, torch.empty(1, 24, 20))[0]
    x.requires_grad_()
    y = layer(x)
    layer.workspace.take("linear", (24, 20), x).fill_(float("nan"))  # another layer uses the memory before backward
    y.backward(grad)
    assert torch.equal(y.detach(), torch.nn.functional.linear(x, values, bias))
    assert torch.equal(x.grad, grad @ values)


def test_experts_that_train_in_full_are_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'full' and bits='nf4': weights that train cannot be quantised"):
        made("full", False, bits="nf4")

"""Recomputed regions: gradients equal those of torch's checkpoint bit for bit; little is kept between the passes."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe.recompute import checkpointed, contexts, kept

OURS = partial(checkpointed, context_fn=contexts("layer"), draws=False)


def _gradients(around, module: nn.Module, x):
    torch.manual_seed(5)
    y = around(module, x)
    torch.rand(7)  # numbers drawn in between do not belong to the region
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(module.parameters())), torch.rand(3)]


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("drops", [0.0, 0.4])
def test_a_region_computes_the_same_as_torchs_checkpoint(needs: bool, drops: float) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(6, 9), nn.Dropout(drops), nn.GELU(), nn.Linear(9, 5), nn.Dropout(drops), nn.Tanh())
    x = torch.randn(4, 6, requires_grad=needs)  # without: the first layer's weights train, but its input does not
    theirs = _gradients(partial(checkpoint, use_reentrant=False), module, x)
    for mine, other in zip(_gradients(partial(OURS, draws=drops > 0), module, x), theirs, strict=True):
        assert torch.equal(mine, other)


def test_a_region_may_contain_another_and_keeps_only_its_input() -> None:
    weight, saved = torch.randn(5, 5, requires_grad=True), []

    def inner(x):
        return (x @ weight).sigmoid().tanh()

    def outer(x, power: int):
        return OURS(inner, x.exp()).pow(power) + OURS(inner, x.cos())

    def gradients(around):
        x = torch.linspace(-1, 1, 10).view(2, 5).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            y = around(x * 2, 3)
        return torch.autograd.grad(y.sum(), (x, weight))

    plain = gradients(outer)
    del saved[:]
    for mine, theirs in zip(gradients(partial(OURS, outer)), plain, strict=True):
        assert torch.equal(mine, theirs)
    assert [tuple(tensor.shape) for tensor in saved] == [(2, 5)], "the input of the region"


def test_the_second_pass_ends_once_all_tensors_are_restored() -> None:
    passes, activations = [], []

    def run(x):
        y = kept("topk", lambda: passes.append("choice") or x.detach().argmax())  # a kept result is computed once
        passes.append("first")
        x = x.exp()
        activations.append(weakref.ref(x))
        x = x * y
        passes.append("second")
        return x * 2

    out = OURS(run, torch.arange(4.0).requires_grad_())
    assert activations[0]() is None, "exp saves its result, but the region does not keep it"
    out.sum().backward()
    assert passes == ["choice", "first", "second", "first"]


def test_a_second_pass_that_differs_is_noticed() -> None:
    factors = iter((torch.ones(3), torch.ones(1)))
    x = torch.ones(3, requires_grad=True)
    y = OURS(lambda x: x * next(factors), x)
    with pytest.raises(AssertionError, match="the second pass differs from the first"):
        y.sum().backward()

"""The reference block against transformers' own, and its statistics against independent formulas."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextSparseMoeBlock,
    load_balancing_loss_func,
)

from moe import reference

D, F_, E, K, T, RANK = 24, 20, 7, 3, 37, 4


def block_of(kind: str, *, normalise: bool = True) -> torch.nn.Module:
    sizes = dict(hidden_size=D, moe_intermediate_size=F_, num_experts=E, num_experts_per_tok=K)
    if kind == "qwen3_vl_moe":
        config = Qwen3VLMoeTextConfig(**sizes)
        config._experts_implementation = "eager"
        block = Qwen3VLMoeTextSparseMoeBlock(config)
    else:
        config = Qwen3MoeConfig(**sizes, norm_topk_prob=normalise)
        config._experts_implementation = "eager"
        block = Qwen3MoeSparseMoeBlock(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.5)
    return block


def factors_of(generator: torch.Generator) -> reference.Factors:
    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.3).requires_grad_()

    return reference.Factors(
        gate_up_A=made(E, RANK, D),
        gate_up_B=made(E, 2 * F_, RANK),
        down_A=made(E, RANK, F_),
        down_B=made(E, D, RANK),
        scale=1.5,
    )


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert wanted.abs().max() > 0
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize(("kind", "normalise"), [("qwen3_vl_moe", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_block_computes_the_same_as_transformers(kind: str, normalise: bool, with_lora: bool) -> None:
    theirs = block_of(kind, normalise=normalise)
    generator = torch.Generator().manual_seed(5)
    x, grad = torch.randn(1, T, D, generator=generator), torch.randn(1, T, D, generator=generator)
    factors = factors_of(generator) if with_lora else None
    weights = dict(theirs.named_parameters())
    tensors = [factors.gate_up_A, factors.gate_up_B, factors.down_A, factors.down_B] if factors else []

    x_theirs = x.clone().requires_grad_()
    used = dict(weights)
    if factors is not None:
        delta = torch.einsum("eor,eri->eoi", factors.gate_up_B, factors.gate_up_A)
        used["experts.gate_up_proj"] = weights["experts.gate_up_proj"] + 1.5 * delta
        delta = torch.einsum("eor,eri->eoi", factors.down_B, factors.down_A)
        used["experts.down_proj"] = weights["experts.down_proj"] + 1.5 * delta
    y_theirs = functional_call(theirs, used, (x_theirs,))
    grads_theirs = torch.autograd.grad(y_theirs, [x_theirs, *weights.values(), *tensors], grad)

    x_ours = x.clone().requires_grad_()
    routing = reference.route(x_ours[0], weights["gate.weight"], top_k=K, normalise=normalise)
    y_ours = reference.block(
        x_ours[0], routing, weights["experts.gate_up_proj"], weights["experts.down_proj"], factors
    )[None]
    grads_ours = torch.autograd.grad(y_ours, [x_ours, *weights.values(), *tensors], grad)
    close(y_ours, y_theirs)
    assert len(grads_ours) == 4 + len(tensors)
    for found, wanted in zip(grads_ours, grads_theirs, strict=True):
        close(found, wanted)


def test_rows_sorted_by_expert_give_the_same_as_the_block() -> None:
    generator = torch.Generator().manual_seed(8)
    x, factors = torch.randn(T, D, generator=generator), factors_of(generator)
    gate_up, down = torch.randn(E, 2 * F_, D, generator=generator), torch.randn(E, D, F_, generator=generator)
    routing = reference.route(x, torch.randn(E, D, generator=generator), top_k=1)
    order = routing.topk_TK[:, 0].argsort(stable=True)
    counts = routing.topk_TK[:, 0].bincount(minlength=E).tolist()
    rows = reference.experts(x[order], counts, gate_up, down, factors)
    close(rows[order.argsort()], reference.block(x, routing, gate_up, down, factors))


def test_balance_loss_is_that_of_transformers_divided_by_k() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2 * T, E, generator=generator).requires_grad_()
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 20:] = 0
    theirs = load_balancing_loss_func((logits,), E, K, mask)
    probs = logits.float().softmax(-1)
    ours = reference.balance_loss(probs, probs.topk(K).indices, mask.flatten().bool())
    close(ours * K, theirs)
    close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours * K, theirs)))


def test_balance_loss_is_one_when_even_and_e_over_k_when_collapsed() -> None:
    valid = torch.ones(E * 4, dtype=torch.bool)
    even = torch.stack([torch.arange(E * 4).remainder(E) + shift for shift in range(K)], 1).remainder(E)
    assert math.isclose(reference.balance_loss(torch.full((E * 4, E), 1 / E), even, valid).item(), 1.0, rel_tol=1e-6)
    same = torch.arange(K).expand(E * 4, K)
    sure = torch.zeros(E * 4, E).index_fill_(1, torch.arange(K), 1 / K)
    assert math.isclose(reference.balance_loss(sure, same, valid).item(), E / K, rel_tol=1e-6)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [9.0, 9.0]])
    wanted = (math.log(2) ** 2 + math.log(math.e + math.e**3) ** 2) / 2
    assert math.isclose(reference.z_loss(logits, torch.tensor([True, True, False])).item(), wanted, rel_tol=1e-6)


def test_statistics_by_hand() -> None:
    topk = torch.tensor([[0, 1], [0, 2], [1, 0], [3, 3]])
    valid = torch.tensor([True, True, True, False])
    counts = reference.load_E(topk, valid, num_experts=4)
    assert counts.tolist() == [3, 2, 1, 0]
    found = reference.load_statistics(counts)
    assert math.isclose(found.max_over_mean, 2.0)
    entropy = -(1 / 2 * math.log(1 / 2) + 1 / 3 * math.log(1 / 3) + 1 / 6 * math.log(1 / 6)) / math.log(4)
    assert math.isclose(found.entropy, entropy)
    assert found.dead == 1
    base = torch.tensor([[1, 0], [1, 3], [2, 3], [0, 1]])
    assert math.isclose(reference.agreement(topk, base, valid), (1 + 0 + 0) / 3, rel_tol=1e-6)

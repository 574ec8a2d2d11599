"""Load statistics of known loads, and that observing them keeps no logits and never waits for the device."""

from dataclasses import replace

import pytest
import torch
from router_stack import EXPERTS, LAYERS, TOP_K, make_balance, route
from torch import Tensor

from moe.balance import Balance


def forced_logits(chosen: list[tuple[int, ...]], experts: int, strength: float = 50.0) -> Tensor:
    logits_TE = torch.zeros(len(chosen), experts)
    for token, choice in enumerate(chosen):
        logits_TE[token, list(choice)] = strength
    return logits_TE.requires_grad_()


def test_a_collapse_on_different_experts_in_each_layer_shows():
    balance = make_balance(layers=4, experts=8, top_k=2)
    balance.start_step(6)
    balance.start_micro_batch(None)
    for layer in range(4):  # together, the layers use all experts evenly
        route(balance, layer, forced_logits([(2 * layer, 2 * layer + 1)] * 6, 8)).sum().backward()
    load = balance.finish_step()
    assert load.balance == pytest.approx([4.0] * 4)
    assert load.max_over_mean == (4.0,) * 4
    assert load.entropy == pytest.approx([1 / 3] * 4)
    assert load.dead == (6,) * 4
    assert (load.loss_balance, load.experts_dead) == (pytest.approx(4.0), 24)


def test_statistics_of_a_known_load():
    balance = make_balance("off", 0.0, layers=2, experts=4, top_k=2)
    balance.start_step(5)
    even = [(0, 1), (2, 3), (0, 1), (2, 3), (0, 1), (1, 2)]  # the last token is padding
    skewed = [(0, 1), (0, 1), (0, 2), (0, 1), (0, 1), (3, 2)]
    for rows in (slice(0, 2), slice(2, 6)):  # two micro-batches
        padded = torch.arange(6)[rows] < 5
        balance.start_micro_batch(padded if rows.stop == 6 else None)
        route(balance, 0, forced_logits(even[rows], 4), base_topk_TK=torch.tensor(skewed[rows]))
        route(balance, 1, forced_logits(skewed[rows], 4), base_topk_TK=torch.tensor(skewed[rows]))
    load = balance.finish_step()
    assert load.counts == ((3, 3, 2, 2), (5, 4, 1, 0))
    assert load.max_over_mean == (1.2, 2.0)
    assert load.dead == (0, 1)
    assert load.agreement == (0.5, 1.0)  # 2 + 0 + 1 + 0 + 2 of 10
    assert load.router_agreement == 0.75
    assert load.expert_load_max_over_mean == 2.0
    assert load.expert_load_entropy == load.entropy[1] == pytest.approx(0.9433483 / 1.3862944)
    assert load.loss_z == pytest.approx(sum(load.z) / 2)


def test_counting_groups_of_tokens_changes_nothing_else():
    even = [(0, 1), (2, 3), (0, 1), (2, 3), (0, 2)]
    loads, gradients = [], []
    for groups in (0, 5):
        balance = make_balance(layers=1, experts=4, top_k=2)
        balance.start_step(4, groups=groups)
        logits_TE = forced_logits(even, 4)
        for rows in (slice(0, 3), slice(3, 5)):  # two micro-batches; the last token is padding
            groups_DT = torch.tensor([[0, 1, 1, 0, 9], [2, 3, 3, 4, 9]])[:, rows].clamp(max=4)
            balance.start_micro_batch(torch.arange(5)[rows] < 4, groups_DT if groups else None)
            route(balance, 0, logits_TE[rows]).square().sum().backward()
        loads.append(balance.finish_step())
        gradients.append(logits_TE.grad)
    assert torch.equal(*gradients)
    assert loads[1].groups == ([[1, 1, 1, 1]], [[1, 1, 1, 1]], [[1, 1, 0, 0]], [[1, 1, 1, 1]], [[0, 0, 1, 1]])
    assert replace(loads[1], groups=()) == loads[0]


def test_nothing_happens_outside_a_step_or_without_gradients():
    balance = make_balance()
    logits_TE = torch.randn(5, EXPERTS, requires_grad=True)
    probs_TE = logits_TE.softmax(-1)
    topk_TK = probs_TE.topk(TOP_K).indices
    assert balance(0, logits_TE, probs_TE, topk_TK) is probs_TE
    balance.start_step(5)
    balance.start_micro_batch(None)
    with torch.no_grad():
        assert balance(0, logits_TE, probs_TE, topk_TK) is probs_TE
    for layer in range(LAYERS):
        route(balance, layer, logits_TE).sum().backward()
    balance.finish_step()
    assert balance(0, logits_TE, probs_TE, topk_TK) is probs_TE


def test_the_second_step_starts_from_nothing():
    balance = make_balance()
    loads = []
    for _ in range(2):
        balance.start_step(5)
        balance.start_micro_batch(None)
        for layer in range(LAYERS):
            route(balance, layer, torch.eye(5, EXPERTS, requires_grad=True)).sum().backward()
        loads.append(balance.finish_step())
    assert loads[0] == loads[1]
    assert (loads[0].agreement, loads[0].router_agreement) == (None, None)  # no base router was run


def kept_bytes(balance: Balance, logits_TE: Tensor) -> int:
    """Return the bytes that autograd keeps for the call beyond the probabilities, which softmax keeps anyway."""
    probs_TE = logits_TE.softmax(-1)
    topk_TK = probs_TE.topk(TOP_K).indices
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        balance(0, logits_TE, probs_TE, topk_TK)
    kept.pop(probs_TE.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize(("z_coefficient", "expected"), [(0.0, 0), (0.1, 40 * 4)])  # with z, one float32 per token
def test_no_logits_are_kept(z_coefficient, expected):
    balance = make_balance("global", z_coefficient)
    balance.start_step(40)
    balance.start_micro_batch(None)
    assert kept_bytes(balance, torch.randn(40, EXPERTS, requires_grad=True)) == expected


def test_bfloat16_logits_get_bfloat16_gradients_of_the_right_size():
    gradients = []
    values = torch.randn(30, EXPERTS).bfloat16()
    for dtype in (torch.bfloat16, torch.float64):
        balance = make_balance(layers=1)
        balance.start_step(30)
        balance.start_micro_batch(None)
        logits_TE = values.to(dtype).detach().requires_grad_()
        (0 * route(balance, 0, logits_TE)).sum().backward()
        balance.finish_step()
        gradients.append(logits_TE.grad)
    assert gradients[0].dtype == torch.bfloat16
    assert (gradients[0] - gradients[1]).norm() <= 0.01 * gradients[1].norm()


def test_forward_and_backward_never_wait_for_the_device():
    """Use the meta device, where reading a value raises."""
    balance = make_balance(device=torch.device("meta"))
    balance.start_step(100, groups=3)
    for _ in range(2):
        groups = torch.zeros(2, 100, dtype=torch.int64, device="meta")
        balance.start_micro_batch(torch.ones(4, 25, dtype=torch.bool, device="meta"), groups)
        for layer in range(LAYERS):
            logits_TE = torch.randn(100, EXPERTS, device="meta", requires_grad=True)
            base = torch.zeros(100, TOP_K, dtype=torch.int64, device="meta")
            route(balance, layer, logits_TE, base).sum().backward()

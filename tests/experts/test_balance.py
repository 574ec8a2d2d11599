"""The balance and z losses against a float64 reference that keeps every logit, sees all ranks and never recomputes."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from router_stack import (
    COEFFICIENT,
    EXPERTS,
    LAYERS,
    RECOMPUTE,
    TOKENS,
    TOP_K,
    VALID,
    Z_COEFFICIENT,
    Stack,
    make_balance,
    micro_batch,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def step(rank: int, world: int, mode: str, recompute: str, micro_batches: int, z_coefficient: float = Z_COEFFICIENT):
    """Run one step as an engine does: sum gradients over micro-batches, then take their mean over the ranks."""
    model = Stack()
    balance = make_balance(mode, z_coefficient)
    step_tokens = sum(sum(valid[:micro_batches]) for valid in VALID[:world])
    balance.start_step(step_tokens)
    for micro in range(micro_batches):
        x_TD, labels_T, valid_T = micro_batch(rank, micro)
        balance.start_micro_batch(valid_T)
        logits = model(x_TD.requires_grad_(), balance, recompute)
        losses_T = F.cross_entropy(logits, labels_T, reduction="none")
        (losses_T[valid_T].sum() * world / step_tokens).backward()
    load = balance.finish_step()
    for parameter in model.parameters():
        if world > 1:
            dist.all_reduce(parameter.grad)
        parameter.grad /= world
    return {name: parameter.grad for name, parameter in model.named_parameters()}, load


def reference(world: int, mode: str, micro_batches: int, z_coefficient: float = Z_COEFFICIENT):
    """Return gradients and values by the definition: all logits of all ranks in one graph, in float64."""
    model = Stack().double()
    step_tokens = sum(sum(valid[:micro_batches]) for valid in VALID[:world])
    loss = torch.zeros((), dtype=torch.float64)
    balance_L, z_L = [0.0] * LAYERS, [0.0] * LAYERS
    counts_LE = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for micro in range(micro_batches):
        batches = [micro_batch(rank, micro) for rank in range(world)]
        x_TD, labels_T, valid_T = (torch.cat(parts) for parts in zip(*batches, strict=True))
        rank_T = torch.cat([torch.full_like(labels, rank) for rank, (_, labels, _) in enumerate(batches)])
        x_TD = x_TD.double()
        for index, layer in enumerate(model.layers):
            logits_TE = layer.router(x_TD)
            probs_TE = logits_TE.softmax(-1)
            topk_TK = probs_TE.topk(TOP_K).indices
            parts = [valid_T] if mode == "global" else [valid_T & (rank_T == rank) for rank in range(world)]
            for part_T in parts:
                tokens = int(part_T.sum())
                if tokens:
                    f_E = F.one_hot(topk_TK[part_T], EXPERTS).sum((0, 1)) / (TOP_K * tokens)
                    p_E = probs_TE[part_T].mean(0)
                    balance_L[index] += tokens / step_tokens * EXPERTS * (f_E * p_E).sum()
            z_L[index] += logits_TE[valid_T].logsumexp(-1).square().sum() / step_tokens
            counts_LE[index] += F.one_hot(topk_TK[valid_T], EXPERTS).sum((0, 1))
            x_TD = layer.mix(x_TD, probs_TE, topk_TK)
        loss = loss + F.cross_entropy(model.head(x_TD)[valid_T], labels_T[valid_T], reduction="sum") / step_tokens
    if mode != "off":
        loss = loss + COEFFICIENT * sum(balance_L) / LAYERS
    (loss + z_coefficient * sum(z_L) / LAYERS).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, [v.item() for v in balance_L], [v.item() for v in z_L], counts_LE.tolist()


# mode, recompute, micro-batches, z coefficient
CASES = [
    *itertools.product(["global"], [r for r in RECOMPUTE if r != "reentrant"], [1, 4], [Z_COEFFICIENT]),
    *itertools.product(["micro"], ["none", "layer"], [4], [Z_COEFFICIENT]),
    *itertools.product(["off"], ["none", "layer"], [4], [Z_COEFFICIENT, 0.0]),
    ("global", "kept all", 4, 0.0),
]


def run_cases(rank: int, world: int):
    return [step(rank, world, *case) for case in CASES]


@functools.cache
def results_of_rank_0(world: int):
    return run_ranks(run_cases, world)[0]


@functools.cache
def cached_reference(*arguments):
    return reference(*arguments)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", [1, 2])
def test_gradients_and_values_match_the_global_definition(world, case):
    mode, _, micro_batches, z_coefficient = case
    gradients, load = results_of_rank_0(world)[CASES.index(case)]
    expected, balance, z, counts = cached_reference(world, mode, micro_batches, z_coefficient)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) <= 1e-5, name
    assert [list(row) for row in load.counts] == counts
    assert load.balance == pytest.approx(balance, rel=1e-5)
    assert load.loss_balance == pytest.approx(sum(balance) / LAYERS, rel=1e-5)
    assert load.z == pytest.approx(z, rel=1e-5)


def test_the_terms_are_large_enough_to_be_missed():
    """Check the test above: each term moves the router's gradient by far more than its tolerance."""
    with_all = reference(2, "global", 4)[0]["layers.1.router.weight"]
    for other in (reference(2, "off", 4), reference(2, "micro", 4), reference(2, "global", 4, 0.0)):
        assert relative_error(other[0]["layers.1.router.weight"], with_all) > 1e-2


class Collectives(TorchDispatchMode):
    """Counts the calls that reach the process group."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def count_collectives(rank: int, world: int):
    """Count collectives of [forward, no_grad forward, backward] for each micro-batch, and of finish_step."""
    found = {}
    for mode, recompute in itertools.product(["off", "micro", "global"], ["none", "layer", "kept all"]):
        model, balance = Stack(), make_balance(mode)
        balance.start_step(sum(VALID[0]) + sum(VALID[1]))
        counts = []
        for micro in range(4):
            x_TD, _, valid_T = micro_batch(rank, micro)
            balance.start_micro_batch(valid_T)
            with Collectives() as forward:
                output = model(x_TD, balance, recompute)
            with Collectives() as evaluation, torch.no_grad():
                model(x_TD, balance, recompute)
            with Collectives() as backward:
                output.sum().backward()
            counts += [forward.count, evaluation.count, backward.count]
        with Collectives() as end:
            balance.finish_step()
        found[mode, recompute] = [*counts, end.count]
    return found


def test_one_collective_per_layer_and_micro_batch_and_one_per_step():
    for found in run_ranks(count_collectives, 2):
        for (mode, recompute), counts in found.items():
            forward = LAYERS if mode == "global" else 0
            assert counts == [forward, 0, 0] * 4 + [1], (mode, recompute)


def act_on_nothing(rank: int, world: int):
    """Lose the gradient on rank 1 only; both ranks must raise, or one would wait forever."""
    model, balance = Stack(), make_balance()
    balance.start_step(2 * TOKENS[1][0])
    balance.start_micro_batch(None)
    output = model(micro_batch(1, 0)[0], balance, "none").sum()
    if rank == 0:
        output.backward()
    with pytest.raises(ValueError, match="layer 0 ran 2 times forward and 1 times backward, over all ranks"):
        balance.finish_step()


def test_every_rank_raises_if_a_loss_does_not_act_on_one():
    run_ranks(act_on_nothing, 2)

"""The expert-parallel layer in a real ZeRO-3 engine, against one process that computes every expert with autograd."""

import functools

import pytest
import torch
from moe_session import Outcome, Plan, plain, session, whole
from ranks import run_ranks
from torch import Tensor

from moe.router import RouterOptions

SKEWED = (9.0, 8.0) + (0.0,) * 10  # experts 0 and 1, both on the first rank of any group
WIDE = {"experts": 264, "hidden": 400, "intermediate": 8, "top_k": 3}  # a router of 105,600 elements

PLANS = {
    (1, "default"): Plan(ep=1),
    (2, "one expert group a rank"): Plan(ep=1),
    (2, "default"): Plan(ep=2),
    (2, "partitioned"): Plan(ep=2, resident=False),
    (2, "four micro-batches"): Plan(ep=2, accumulation=4),
    (2, "lora router"): Plan(ep=2, router=RouterOptions(mode="lora", r=3, alpha=6)),
    (2, "frozen router"): Plan(ep=2, router=RouterOptions(mode="frozen")),
    (2, "trained experts"): Plan(ep=2, experts="full", steps=3),
    (2, "wide router"): Plan(ep=2, model=WIDE, resident=False, persistence=100_000, steps=4),
    (4, "default"): Plan(ep=2),
    (4, "one group"): Plan(ep=4),
    (4, "partitioned"): Plan(ep=2, resident=False, accumulation=2),
    (4, "skewed"): Plan(ep=4, bias=SKEWED),
    (4, "float32 gate"): Plan(ep=2, router=RouterOptions(mode="full", float32=True)),
}


@functools.cache
def outcomes(world: int) -> dict[str, list[Outcome]]:
    """One start of `world` ranks for all its plans."""
    names = [name for size, name in PLANS if size == world]
    results = run_ranks(session, world, [PLANS[world, name] for name in names], timeout=240)
    return {name: [result[i] for result in results] for i, name in enumerate(names)}


@functools.cache
def expected(key: str) -> Outcome:
    return plain(_WANTED[key])


_WANTED: dict[str, Plan] = {}


def reference_of(plan: Plan) -> Outcome:
    """What all rows on one process give; layout, accumulation and recompute do not matter to it."""
    key = repr((plan.model, plan.bias, plan.router, plan.experts, plan.steps, plan.rows, plan.dtype))
    _WANTED[key] = plan
    return expected(key)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value of the tensor."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits_of(found: list[Outcome]) -> Tensor:
    return torch.cat([outcome.logits for outcome in found])


@pytest.mark.parametrize(("world", "name"), PLANS)
def test_every_layout_computes_what_one_process_computes(world: int, name: str) -> None:
    plan, found = PLANS[world, name], outcomes(world)[name]
    wanted = reference_of(plan)
    assert relative(logits_of(found), wanted.logits) < 1e-5
    for layer, grad in enumerate(wanted.input_grads):
        assert relative(torch.cat([outcome.input_grads[layer] for outcome in found]), grad) < 1e-5
    grads = whole(found, plan.ep)
    assert set(grads) == set(wanted.grads)
    for key, grad in wanted.grads.items():
        assert relative(grads[key], grad) < 1e-5, key
        assert grad.abs().max() > 0, f"{key}: a gradient that is zero compares nothing"
    for outcome in found:
        assert outcome.norms == pytest.approx(wanted.norms, rel=1e-5)
        assert outcome.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert min(wanted.norms) > 0.05, "clipping must act"

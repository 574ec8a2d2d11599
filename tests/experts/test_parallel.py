"""The expert-parallel layer in a real ZeRO-3 engine, against one process that computes all experts with autograd."""

import functools

import pytest
import torch
from moe_session import Outcome, Plan, plain, session, whole
from ranks import run_ranks
from torch import Tensor

from benchmarks.harness.collectives import Kind
from moe.router import RouterOptions

SKEWED = (9.0, 8.0) + (0.0,) * 10  # favours experts 0 and 1, both on the first rank of any group
WIDE = {"experts": 264, "hidden": 400, "intermediate": 8, "top_k": 3}  # a router of 105,600 elements

PARITY = {
    (1, "default"): Plan(ep=1, steps=5),
    (1, "selective"): Plan(ep=1, recompute="selective", accumulation=2),
    (2, "one expert group per rank"): Plan(ep=1, steps=5),
    (2, "default"): Plan(ep=2, steps=5),
    (2, "partitioned"): Plan(ep=2, resident=False),
    (2, "four micro-batches"): Plan(ep=2, accumulation=4),
    (2, "lora router"): Plan(ep=2, router=RouterOptions(mode="lora", r=3, alpha=6)),
    (2, "frozen router"): Plan(ep=2, router=RouterOptions(mode="frozen")),
    (2, "trained experts"): Plan(ep=2, experts="full"),
    (2, "wide router"): Plan(ep=2, model=WIDE, resident=False, persistence=100_000, steps=4),
    (2, "wide router, four micro-batches"): Plan(
        ep=2, model=WIDE, resident=False, persistence=100_000, accumulation=4, recompute="layer"
    ),
    (4, "default"): Plan(ep=2, steps=5),
    (4, "one group"): Plan(ep=4, steps=5),
    (4, "partitioned"): Plan(ep=2, resident=False, accumulation=2, recompute="selective"),
    (4, "skewed"): Plan(ep=4, bias=SKEWED),
    (4, "float32 gate"): Plan(ep=2, router=RouterOptions(mode="full", float32=True)),
}
BF16 = Plan(ep=2, dtype="bfloat16", balance=False)


@functools.cache
def others() -> dict[str, Plan]:
    """Return the plans that are compared with each other or with a wider tolerance; all on 2 ranks with ep 2."""
    topk = tuple(reference_of(BF16).topk)
    gate = RouterOptions(mode="full", float32=True)
    return {
        "none again": PARITY[2, "default"],
        "layer": Plan(ep=2, recompute="layer", steps=5),
        "selective": Plan(ep=2, recompute="selective", steps=5),
        "fifty steps": Plan(ep=2, recompute="selective", steps=50),
        "bfloat16": Plan(ep=2, dtype="bfloat16", balance=False, topk=topk),
        "bfloat16, float32 gate": Plan(
            ep=2, dtype="bfloat16", balance=False, topk=topk, router=gate, recompute="selective"
        ),
    }


@functools.cache
def outcomes(world: int) -> dict[str, list[Outcome]]:
    """Run all plans for `world` ranks in one start."""
    plans = {name: plan for (size, name), plan in PARITY.items() if size == world} | (others() if world == 2 else {})
    results = run_ranks(session, world, list(plans.values()))
    return {name: [result[i] for result in results] for i, name in enumerate(plans)}


_EXPECTED: dict[str, Outcome] = {}


def reference_of(plan: Plan, world: int = 1) -> Outcome:
    """Return the outcome of all rows on one process; the layout matters only for micro-batches, and only to balance."""
    groups = plan.micro_rows(world) if plan.accumulation > 1 else []
    key = repr((plan.model, plan.bias, plan.router, plan.experts, plan.steps, plan.dtype, plan.balance, groups))
    if key not in _EXPECTED:
        _EXPECTED[key] = plain(plan, world)
    return _EXPECTED[key]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest value of the tensor."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits_of(found: list[Outcome]) -> Tensor:
    return torch.cat([outcome.logits for outcome in found])


@pytest.mark.parametrize(("world", "name"), PARITY)
def test_every_layout_computes_what_one_process_computes(world: int, name: str) -> None:
    plan, found = PARITY[world, name], outcomes(world)[name]
    wanted = reference_of(plan, world)
    assert relative(logits_of(found), wanted.logits) < 1e-5
    for layer, grad in enumerate(wanted.input_grads):
        assert relative(torch.cat([outcome.input_grads[layer] for outcome in found]), grad) < 1e-5
    grads = whole(found, plan.ep)
    assert set(grads) == set(wanted.grads)
    for key, grad in wanted.grads.items():
        assert relative(grads[key], grad) < 1e-5, key
        assert grad.abs().max() > 0, f"{key}: comparing a zero gradient proves nothing"
    for outcome in found:
        assert outcome.norms == pytest.approx(wanted.norms, rel=1e-5)
        assert outcome.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert outcome.balance == pytest.approx(wanted.balance, rel=1e-5)
        assert outcome.z == pytest.approx(wanted.z, rel=1e-5)
        assert outcome.agreement == (None if plan.router.mode == "frozen" else pytest.approx(wanted.agreement))
    assert min(wanted.norms) > 0.05, "clipping must act"


def test_forced_skew_sends_every_row_to_one_rank() -> None:
    received = [outcome.received for outcome in outcomes(4)["skewed"]]
    assert received == [[8 * 24 * 2] * 2, [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16, float32 gate"])
def test_bfloat16_stays_within_two_percent_with_the_same_routing(name: str) -> None:
    found, wanted = outcomes(2)[name], reference_of(BF16)
    pairs = {"logits": (logits_of(found), wanted.logits)}
    pairs |= {key: (grad.float(), wanted.grads[key]) for key, grad in whole(found, 2).items()}
    for layer, grad in enumerate(wanted.input_grads):
        pairs[f"input {layer}"] = (torch.cat([outcome.input_grads[layer] for outcome in found]), grad)
    for key, (ours, theirs) in pairs.items():
        assert (ours - theirs).norm() <= 0.02 * theirs.norm(), key
    assert len(pairs) == 1 + 2 * 6 + 2


@pytest.mark.parametrize(("mode", "units"), [("none again", 4), ("layer", 6), ("selective", 4)])
def test_recompute_is_exact_and_selective_sends_no_row_twice(mode: str, units: int) -> None:
    none, found = outcomes(2)["default"], outcomes(2)[mode]
    for one, other in zip(none, found, strict=True):
        assert other.losses == one.losses
        assert other.norms == one.norms
        assert all(torch.equal(other.grads[key], one.grads[key]) for key in one.grads)
    sent = sum(count for o in found for kind, count in o.bytes.items() if _rows(kind))
    payload = 8 * 24 * 2 * 48 * 4  # rows, tokens, top-k, hidden, float32: all routed rows of one layer, once
    assert sent == units * payload * 2
    for outcome in found:
        calls = {kind.dtype: n for kind, n in outcome.calls.items() if kind.collective == "all_to_all_single"}
        assert calls == {"int64": 2, "float32": units * 2}, (
            "one exchange of counts per layer, with or without recompute"
        )


def _rows(kind: Kind) -> bool:
    return kind.collective == "all_to_all_single" and kind.dtype == "float32"


def test_memory_is_flat_over_fifty_steps() -> None:
    for outcome in outcomes(2)["fifty steps"]:
        assert len(outcome.live) == 5, "number and bytes of the live tensors, after every tenth step"
        assert len(set(outcome.live)) == 1


@pytest.mark.parametrize(("world", "name"), PARITY)
def test_the_engines_fetch_trace_completes(world: int, name: str) -> None:
    """Until it is complete, persistent weights are gathered in every micro-batch, and ranks may drift apart."""
    assert all(outcome.trace_complete for outcome in outcomes(world)[name])

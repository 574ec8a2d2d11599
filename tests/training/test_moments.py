"""AdamW's moments in bfloat16 or in host memory: the arithmetic, the bytes, and the checks."""

import math

import pytest
import torch

from finetune.planner.gpus import cluster
from finetune.planner.plan import plan
from finetune.ranks import adamw
from finetune.ranks.adamw import AdamW
from finetune.settings.checks import base_family, cross_check
from finetune.settings.recipes import load_recipe

STEPS, SIZE, LR, DECAY = 20, 5003, 1e-2, 0.1
BETAS, EPS = (0.9, 0.95), 1e-8


def trained(monkeypatch, **options):
    """Train a tensor in pieces of 1,024 elements; return it with its state."""
    monkeypatch.setattr(adamw, "UPDATED", 1024)
    generator = torch.Generator().manual_seed(1)
    weights = torch.nn.Parameter(torch.randn(SIZE, generator=generator))
    optimizer = AdamW([{"params": [weights], "weight_decay": DECAY}], lr=LR, betas=BETAS, eps=EPS, **options)
    for _ in range(STEPS):
        weights.grad = torch.randn(SIZE, generator=generator)
        optimizer.step()
    return weights.detach(), optimizer.state[weights]


def test_moments_in_host_memory_change_no_bit(monkeypatch):
    weights, state = trained(monkeypatch)
    again, offloaded = trained(monkeypatch, offload=True)
    assert torch.equal(weights, again)
    assert all(torch.equal(state[name], offloaded[name]) for name in state)


def test_moments_are_on_the_device_of_their_weights_or_on_the_host():
    flat = torch.empty(8, device="meta")
    group = [{"params": [flat], "weight_decay": DECAY}]
    for offload, place in ((False, "meta"), (True, "cpu")):
        state = AdamW(group, lr=LR, betas=BETAS, eps=EPS, offload=offload).state_of(flat)
        assert {state[name].device.type for name in adamw.MOMENTS} == {place}


def test_moments_in_bfloat16_are_rounded_once_a_step(monkeypatch):
    weights, state = trained(monkeypatch, moments=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    expected = torch.randn(SIZE, generator=generator).double()
    mean = square = torch.zeros(SIZE, dtype=torch.double)
    for step in range(1, STEPS + 1):
        gradient = torch.randn(SIZE, generator=generator).double()
        mean, square = (
            beta * moment + (1 - beta) * value
            for beta, moment, value in zip(BETAS, (mean, square), (gradient, gradient**2), strict=True)
        )
        divisor = square.sqrt() / math.sqrt(1 - BETAS[1] ** step) + EPS
        expected = expected * (1 - LR * DECAY) - LR / (1 - BETAS[0] ** step) * mean / divisor
        mean, square = (moment.bfloat16().double() for moment in (mean, square))
    assert {state[name].dtype for name in adamw.MOMENTS} == {torch.bfloat16}
    # a value near the middle of two may be rounded the other way, because the kernel computes in float32
    assert (state["exp_avg_sq"].double() == square).float().mean() > 0.99
    assert (weights.double() - expected).abs().max() < 1e-3
    assert (weights.double() - expected).abs().mean() < 2e-6


def planned(*words):
    config, problems = load_recipe("qwen3-vl-30b-a3b-lora", words)
    assert not problems
    return plan(config, base_family(config), cluster("h100-80gb", gpus=8, per_node=None, price=None)).memory.always


def test_the_plan_knows_where_moments_are():
    whole = planned()["optimiser"]
    assert planned("optim.moments=bfloat16")["optimiser"] * 2 == whole
    assert "optimiser" not in planned("optim.offload=true")


def test_a_slow_mean_is_refused_in_bfloat16():
    config, problems = load_recipe("tiny-cpu", ["optim.moments=bfloat16", "optim.betas=[0.9,0.999]"])
    assert not problems
    (wrong,) = (found for found in cross_check(config, ranks=1) if found.key == "optim.betas")
    allowed = "with optim.moments=bfloat16 the second one must be at most 0.99: a slower mean would not move"
    assert str(wrong).startswith(f"optim.betas = 0.999: {allowed}")
    config, problems = load_recipe("tiny-cpu", ["optim.moments=int8"])
    assert "optim.moments = 'int8'" in str(problems[0])


@pytest.mark.parametrize("beta", [0.99, 0.95])
def test_a_mean_moves_in_bfloat16_with_every_rate_that_is_allowed(beta):
    square = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(2000):
        square = (square.float() * beta).bfloat16()
    assert square < 0.01

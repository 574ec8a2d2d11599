"""Balance errors: calls whose result would not be exact, losses that do not act, settings that make no sense."""

import pytest
import torch
from router_stack import EXPERTS, HIDDEN, LAYERS, Stack, make_balance, route

from finetune.config import AdaptersConfig, ModelConfig, RouterPartConfig, RunConfig
from finetune.settings.checks import cross_check, frozen_router
from finetune.settings.problems import Problem
from finetune.settings.typed import TypedTree
from moe.balance import Balance
from moe.config import MoeConfig


def begun(step_tokens: int = 5, **changed) -> Balance:
    balance = make_balance(**changed)
    balance.start_step(step_tokens)
    balance.start_micro_batch(None)
    return balance


def test_reentrant_checkpointing_is_refused():
    x_TD = torch.randn(5, HIDDEN, requires_grad=True)
    output = Stack()(x_TD, begun(), "reentrant")
    with pytest.raises(ValueError, match=r"Layer 2 is recomputed in backward.*reentrant \(set use_reentrant=False\)"):
        output.sum().backward()


def test_with_recompute_a_backward_after_the_next_micro_batch_began_is_refused():
    balance = begun()
    output = Stack()(torch.randn(5, HIDDEN), balance, "layer")
    balance.start_micro_batch(None)
    with pytest.raises(ValueError, match="start_micro_batch was called before the backward of the micro-batch before"):
        output.sum().backward()


def test_a_second_forward_in_one_micro_batch_is_refused():
    balance = begun()
    Stack()(torch.randn(5, HIDDEN), balance, "none")
    with pytest.raises(ValueError, match="Layer 0 ran twice in one micro-batch"):
        Stack()(torch.randn(5, HIDDEN), balance, "none")


def test_calls_out_of_order_are_refused():
    balance = make_balance()
    with pytest.raises(ValueError, match="start_micro_batch outside of a step"):
        balance.start_micro_batch(None)
    with pytest.raises(ValueError, match="finish_step was called without start_step"):
        balance.finish_step()
    balance.start_step(5)
    with pytest.raises(ValueError, match="before start_micro_batch"):
        route(balance, 0, torch.randn(5, EXPERTS, requires_grad=True))


def test_a_step_without_tokens_is_refused():
    with pytest.raises(ValueError, match="A step has 0 valid tokens"):
        make_balance().start_step(0)


def test_a_mask_of_another_length_is_refused():
    balance = make_balance()
    balance.start_step(5)
    balance.start_micro_batch(torch.ones(2, 3))
    with pytest.raises(ValueError, match="scored 5 tokens, but the mask given to start_micro_batch has 6 entries"):
        route(balance, 0, torch.randn(5, EXPERTS, requires_grad=True))


def test_a_wrong_number_of_step_tokens_is_refused():
    balance = begun(step_tokens=8)
    for layer in range(LAYERS):
        route(balance, layer, torch.randn(5, EXPERTS, requires_grad=True)).sum().backward()
    with pytest.raises(ValueError, match="Layer 0 routed 5 valid tokens in this step.*start_step was given 8"):
        balance.finish_step()


def test_a_model_that_did_not_train_is_refused():
    balance = begun()
    with torch.no_grad():
        Stack()(torch.randn(5, HIDDEN), balance, "none")
    with pytest.raises(ValueError, match=r"routed 0 valid tokens.*eval mode or under no_grad"):
        balance.finish_step()


def test_a_frozen_router_with_nothing_before_it_is_refused():
    balance = begun()
    for layer in range(LAYERS):
        route(balance, layer, torch.randn(5, EXPERTS))
    with pytest.raises(ValueError, match="no layer's routing records a gradient: the router is frozen"):
        balance.finish_step()


def test_a_frozen_first_router_with_nothing_before_it_is_no_error():
    balance = begun()
    route(balance, 0, torch.randn(5, EXPERTS))  # the first adapter comes after it
    for layer in range(1, LAYERS):
        route(balance, layer, torch.randn(5, EXPERTS, requires_grad=True)).sum().backward()
    assert balance.finish_step().loss_balance > 0


def test_a_layer_that_drops_the_probabilities_is_refused():
    balance = begun()
    for layer in range(LAYERS):
        probs_TE = route(balance, layer, torch.randn(5, EXPERTS, requires_grad=True))
        if layer != 1:
            probs_TE.sum().backward()
    with pytest.raises(ValueError, match="layer 1 ran 1 times forward and 0 times backward"):
        balance.finish_step()


def test_probabilities_that_are_not_finite_are_refused():
    balance = begun()
    for layer in range(LAYERS):
        logits_TE = torch.randn(5, EXPERTS)
        logits_TE[3] = float("nan") if layer == 2 else 0.0
        route(balance, layer, logits_TE.requires_grad_()).sum().backward()
    with pytest.raises(ValueError, match="balance value of layer 2 must be a finite number above 0, got nan"):
        balance.finish_step()


def moe_problems(family: str = "qwen3-vl-30b-a3b", **moe) -> list[Problem]:
    adapters = AdaptersConfig(router=RouterPartConfig(mode="full"))
    config = RunConfig(model=ModelConfig(family=family), moe=MoeConfig(**moe), adapters=adapters)
    return [problem for problem in cross_check(config, ranks=1) if problem.key.startswith("moe.")]


@pytest.mark.parametrize("moe", [{}, {"balance": "global"}, {"balance": "micro", "z_coefficient": 1e-4}], ids=str)
def test_usual_settings_have_no_problem(moe):
    assert moe_problems(**moe) == []


@pytest.mark.parametrize(
    ("moe", "text"),
    [
        (
            {"balance": "global", "balance_coefficient": -0.1},
            "moe.balance_coefficient = -0.1: it must be a finite number",
        ),
        ({"z_coefficient": float("inf")}, "moe.z_coefficient = inf: it must be a finite number of 0 or more"),
        ({"balance": "micro", "balance_coefficient": 0.0}, "moe.balance=micro does nothing without a coefficient"),
        ({"balance_coefficient": 0.01}, "moe.balance_coefficient = 0.01: it has no effect, because moe.balance is off"),
        ({"balance": "global", "family": "qwen3-vl-2b"}, "moe.balance = 'global': qwen3-vl-2b is dense"),
        ({"z_coefficient": 0.1, "family": "qwen3-vl-2b"}, "moe.z_coefficient = 0.1: qwen3-vl-2b is dense"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_errors(moe, text):
    (problem,) = moe_problems(**moe)
    assert text in str(problem)
    assert problem.level == "error"


def test_a_frozen_router_with_a_balance_or_z_loss_warns():
    both = MoeConfig(balance="global", z_coefficient=0.001)
    assert frozen_router(MoeConfig(), router_trains=False) == []
    assert frozen_router(both, router_trains=True) == []
    warnings = frozen_router(both, router_trains=False)
    assert [(warning.key, warning.level) for warning in warnings] == [
        ("moe.balance", "warning"),
        ("moe.z_coefficient", "warning"),
    ]
    assert "the router is frozen, so the loss can only move the hidden states" in str(warnings[0])


def test_off_needs_no_quotes_although_yaml_reads_it_as_false():
    tree = TypedTree(RunConfig)
    tree.take({"moe": {"balance": "global"}}, "recipe")
    tree.take({"moe": {"balance": False}}, "command line")
    assert (tree.finish().moe.balance, tree.problems) == ("off", [])

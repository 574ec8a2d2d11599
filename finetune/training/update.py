"""One update of the weights, from this rank's share of a step."""

from collections.abc import Callable
from typing import Any

import torch

from data.stream.batch import Step, keys_of
from finetune.config import RunConfig
from finetune.model.loss import Losses, normaliser, step_loss, step_sums
from finetune.ranks.collectives import sum_over_ranks
from finetune.ranks.engine import backward, require_step_applied
from finetune.tracking.token_groups import TokenGroups
from finetune.training.bad_steps import require_finite
from moe.balance import Balance
from moe.expert_load import StepLoad


def take_step(
    engine: Any,
    step: Step,
    config: RunConfig,
    balance: Balance | None,
    number: int,
    device: torch.device,
    announce: Callable[..., None],
    groups: TokenGroups | None = None,
) -> tuple[dict[str, float], StepLoad | None, list[float]]:
    """Update the weights once; every rank must call this with its share of the same step.

    Calls `announce(step, what, samples)` before anything that waits for other ranks. If no token of the step is
    supervised, nothing is computed, and the loss is zero. With `groups`, the experts' load is also counted by kind and
    by source of the tokens; the counts travel with the others. Returns the losses and the gradient's norm, the experts'
    load, and this rank's part of the loss of each of its samples, in order.
    """
    announce(number, "the sums before the first forward", keys_of(step.batches))
    sums = step_sums(step.sums, device)
    total = normaliser(sums, config.loss.normalise)
    if not total:
        return {"loss": 0.0, "grad_norm": 0.0}, None, []
    tokens = int(sum_over_ranks([step.tokens], device)[0])
    if balance is not None:
        balance.start_step(tokens, groups=len(groups) if groups is not None else 0)
    rows: list[Losses] = []
    next_row = engine.module.send(step.batches[0], device, groups)
    for at, batch in enumerate(step.batches):
        engine.set_gradient_accumulation_boundary(at == len(step.batches) - 1)
        announce(number, f"row {at} of {len(step.batches)}", batch.keys)
        row = next_row.arrived()
        if balance is not None:
            balance.start_micro_batch(row.valid_T, row.groups_DT)
        row_losses = engine(batch=row)
        # sent while this forward is queued, and before backward, at whose end the engine waits for the device
        if at + 1 < len(step.batches):
            next_row = engine.module.send(step.batches[at + 1], device, groups)
        backward(engine, row_losses.objective, total)
        rows.append(Losses(*(losses.detach() for losses in row_losses)))
    announce(number, "the sums after the last backward")
    loss, by_sample = step_loss(rows, total)
    losses = {"loss": loss}
    require_finite(losses, number)
    load = balance.finish_step() if balance is not None else None
    if load is not None:
        losses |= {"loss_balance": load.loss_balance, "loss_z": load.loss_z}
        require_finite(losses, number)
    announce(number, "the update")
    engine.step()
    require_step_applied(engine, number)
    return {**losses, "grad_norm": float(engine.get_global_grad_norm())}, load, by_sample

"""One rank of the wrapper's tests: a step under ZeRO-3 on rows with different media."""

from dataclasses import dataclass
from typing import Any

import torch
from base_folders import dense_model
from deepspeed.utils import safe_get_full_grad
from packed_rows import SPEC, alone, row
from tiny_moe import vl_model
from torch import Tensor

from data.stream.batch import LossSums, loss_sums
from finetune.model.forward import PackedModel
from finetune.model.loss import Normalise, normaliser, step_loss, step_sums
from finetune.model.recompute import set_recompute
from finetune.model.resident import make_resident
from finetune.model.varlen import register
from finetune.ranks.engine import EngineOptions, backward, initialize, require_step_applied, start_distributed
from moe.parallel import LayerOptions, replace_moe_blocks

KINDS: tuple[tuple[str, ...], ...] = (("", ""), ("i", ""), ("v",), ("iv", "w"), ())
"""A rank's row by its media: text, images, videos, both, or nothing at all (a dummy)."""
PAIRS = [(KINDS[a], KINDS[b]) for a in range(5) for b in range(5)]
ONE_WAY = [(KINDS[a], KINDS[(a + step) % 5]) for step in (1, 2) for a in range(5)]
"""Every pair of different kinds, once."""
FOURS = [KINDS[:4], KINDS[1:], (KINDS[4], KINDS[4], KINDS[2], KINDS[0]), (KINDS[3], KINDS[0], KINDS[0], KINDS[0])]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step: trainable parameters (by a part of their names), their storage, and the media of each rank."""

    train: tuple[str, ...] = ("visual", "lm_head", "input_layernorm")
    resident: bool = False
    kind: str = "moe"
    tied: bool = False
    ep: int = 2
    how: Normalise = "token"
    recompute: str = "none"
    dtype: str = "float32"
    rows: Any = tuple(PAIRS)
    """The media of the samples, by [micro-batch][rank]."""


@dataclass(kw_only=True)
class Outcome:
    loss: float
    grads: dict[str, Tensor]
    tower_calls: int = 0
    head_calls: int = 0
    ce: list[list[float]]


def base_model(case: Case) -> Any:
    model = vl_model() if case.kind == "moe" else dense_model(tied=case.tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in case.train))
    return model


def reference(case: Case) -> Outcome:
    """Take the same step in one process with transformers alone: single samples, full logits, autograd."""
    model, objectives, total, ce = base_model(case), [], 0.0, []
    for mixes in (mixes for ranks in case.rows for mixes in ranks):
        batch, weights = row(*mixes), loss_sums(row(*mixes))
        ce.append([])
        owners, label_weights = batch.sample_ids[0], batch.loss_weights[0]
        for number, loss in enumerate(alone(model, batch) if mixes else []):
            n = float(label_weights[owners == number].sum())
            objectives.append(loss * {"token": 1.0, "sample": 1 / n, "sqrt": n**-0.5}[case.how])
            ce[-1].append(float(loss.detach()))
        total += {"token": weights.tokens, "sample": weights.samples, "sqrt": weights.sqrt}[case.how]
    loss = torch.stack(objectives).sum() / total
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return Outcome(loss=float(loss.detach()), grads=grads, ce=ce)


def session(rank: int, world: int, cases: list[Case]) -> list[Outcome]:
    """Run each case on this rank, with one engine at a time."""
    start_distributed()
    return [_step(rank, case) for case in cases]


def _step(rank: int, case: Case) -> Outcome:
    model = base_model(case).to(getattr(torch, case.dtype))
    if case.kind == "moe":
        replace_moe_blocks(model, ep_size=case.ep, options=LayerOptions(resident=case.resident))
    if case.resident:
        make_resident(model)
    register()
    model.set_attn_implementation("segments")
    wrapped = PackedModel(model, spec=SPEC, normalise=case.how)
    options = EngineOptions(
        micro_batches_per_step=len(case.rows), dtype=case.dtype, clip_norm=1e9, persistence_threshold=0
    )
    engine = initialize(wrapped, options)
    set_recompute(model, case.recompute)
    wrapped.train()
    calls = {"visual": 0, "lm_head": 0}
    for name, module in (("visual", model.model.visual), ("lm_head", model.lm_head)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    rows = [row(*ranks[rank]) for ranks in case.rows]
    local = sum((loss_sums(batch) for batch in rows), LossSums())
    total = normaliser(step_sums(local, torch.device("cpu")), case.how)
    losses = []
    for batch in rows:
        losses.append(engine(batch=batch))
        backward(engine, losses[-1].objective, total)
        if batch is not rows[-1]:
            engine.step()
    trained = {n.removeprefix("model."): p for n, p in wrapped.named_parameters() if p.requires_grad}
    grads = {
        "model." * (not n.startswith(("model.", "lm_head"))) + n: safe_get_full_grad(p).float()
        for n, p in trained.items()
    }
    engine.step()
    require_step_applied(engine, 0)
    loss = step_loss(losses, total)[0]
    ce = [each.ce_S.tolist() for each in losses]
    engine.destroy()
    return Outcome(loss=loss, grads=grads, tower_calls=calls["visual"], head_calls=calls["lm_head"], ce=ce)

"""One rank of the expert-parallel tests: train a plan's model, and return everything that can be compared."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from tiny_moe import (
    LORA,
    batch,
    freeze,
    plain_model,
    rows_of,
    start_factors,
    token_count,
    token_loss,
    vl_model,
)
from torch import Tensor

from benchmarks.harness.collectives import CollectiveCounter
from finetune.model.recompute import set_recompute
from finetune.model.resident import make_resident
from finetune.ranks.engine import EngineOptions, backward, initialize, require_step_applied, start_distributed
from moe import reference
from moe.balance import Balance
from moe.parallel import LayerOptions, replace_moe_blocks
from moe.router import RouterOptions

CLIP, LR, EPS = 0.05, 1e-3, 1e-6
BALANCE, Z = 0.3, 0.02


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training: the model, its distribution over ranks, and changes to its routing."""

    ep: int = 1
    resident: bool = True
    accumulation: int = 1
    recompute: str = "none"
    dtype: str = "float32"
    experts: str = "lora"
    router: RouterOptions = RouterOptions(mode="full")
    steps: int = 2
    bias: tuple[float, ...] = ()
    """Added to the logits of every layer, to force the choice of experts."""
    model: dict[str, int] = field(default_factory=dict)
    rows: int = 8
    persistence: int | None = None
    topk: tuple[Tensor, ...] = ()
    """The injected reference routing: the experts of each token of all rows, by layer."""
    seed: int = 3
    balance: bool = True

    def micro_rows(self, world: int) -> list[list[int]]:
        """Return, for each m, the rows in the m-th micro-batches of all ranks."""
        share = self.rows // world // self.accumulation
        starts = [[(rank * self.accumulation + m) * share for rank in range(world)] for m in range(self.accumulation)]
        return [[first + row for first in firsts for row in range(share)] for firsts in starts]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(kw_only=True)
class Outcome:
    """The results of a plan, on one rank or in the plain model of all rows."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    input_grads: list[Tensor] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    topk: list[Tensor] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    calls: dict[Any, int] = field(default_factory=dict)
    bytes: dict[Any, int] = field(default_factory=dict)
    live: list[tuple[int, int]] = field(default_factory=list)
    trace_complete: bool = False
    balance: list[float] = field(default_factory=list)
    z: list[float] = field(default_factory=list)
    agreement: float | None = None


def plain(plan: Plan, world: int = 1) -> Outcome:
    """Train on all rows in one process with torch alone: autograd, clip_grad_norm_, AdamW."""
    model, data, out = vl_model(**plan.model), batch(plan.rows), Outcome()
    if plan.dtype == "bfloat16":
        model = model.bfloat16().float()  # the same weights, computed exactly
    freeze(model)
    blocks = plain_model(model, router=plan.router, experts=plan.experts, seed=plan.seed)
    if plan.dtype == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    for block in blocks:
        block.logits_bias = torch.tensor(plan.bias) if plan.bias else 0.0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, eps=EPS, betas=(0.9, 0.95), weight_decay=0.0)
    total = token_count(data["input_ids"])
    for step in range(plan.steps):
        logits = model(**rows_of(data, slice(None)), use_cache=False).logits
        if step == 0:
            for block in blocks:
                block.input.retain_grad()
        loss = token_loss(logits, data["input_ids"]) / total
        balance, z = _plain_balance(blocks, plan.micro_rows(world))
        (loss + (BALANCE * balance + Z * z if plan.balance else 0.0)).backward()
        out.balance.append(float(balance.detach()))
        out.z.append(float(z.detach()))
        if step == 0:
            out.logits, out.topk = logits.detach(), [block.routing.topk_TK for block in blocks]
            out.agreement = sum(block.agreement() for block in blocks) / len(blocks)
            out.input_grads = [block.input.grad for block in blocks]
            out.grads = {name: p.grad.clone() for name, p in trained.items()}
        out.norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)))
        out.losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return out


def _plain_balance(blocks: list[Any], groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Compute the two values from their definitions, with micro-batches weighted by their tokens."""
    length = len(blocks[0].routing.topk_TK) // sum(map(len, groups))
    balance = z = torch.zeros(())
    for block in blocks:
        for rows in groups:
            tokens = torch.tensor([row * length + t for row in rows for t in range(length)])
            valid, share = torch.ones(len(tokens)), len(tokens) / len(block.routing.topk_TK) / len(blocks)
            routing = block.routing
            balance = balance + share * reference.balance_loss(routing.probs_TE[tokens], routing.topk_TK[tokens], valid)
            z = z + share * reference.z_loss(routing.logits_TE[tokens], valid)
    return balance, z


def session(rank: int, world: int, plans: list[Plan]) -> list[Outcome]:
    """Train each plan's model on this rank, with one engine at a time in the same process."""
    start_distributed()
    return [_train(rank, world, plan) for plan in plans]


def build(plan: Plan) -> tuple[Any, list[Any], Balance | None]:
    """Build the plan's model as a run would: freeze, replace, adapt, keep resident."""
    model = vl_model(**plan.model).to(plan.torch_dtype)
    freeze(model)
    text = model.config.text_config
    balance = _balance(text) if plan.balance else None
    lora = LORA if plan.experts == "lora" else None
    options = LayerOptions(experts=plan.experts, lora=lora, router=plan.router, resident=plan.resident, seed=plan.seed)
    layers = replace_moe_blocks(model, ep_size=plan.ep, options=options, balance=balance)
    for layer in layers:
        start_factors(layer)
    if plan.resident:
        make_resident(model)
    return model, layers, balance


def _balance(text: Any) -> Balance:
    return Balance(
        mode="global",
        coefficient=BALANCE,
        z_coefficient=Z,
        layers=text.num_hidden_layers,
        experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        device=torch.device("cpu"),
    )


def _train(rank: int, world: int, plan: Plan) -> Outcome:
    model, layers, balance = build(plan)
    persistence = plan.persistence if plan.persistence is not None else (1_000_000 if plan.resident else 0)
    options = EngineOptions(
        micro_batches_per_step=plan.accumulation,
        clip_norm=CLIP,
        dtype=plan.dtype,
        lr=LR,
        eps=EPS,
        betas=(0.9, 0.95),
        persistence_threshold=persistence,
    )
    engine = initialize(model, options)
    set_recompute(model, plan.recompute)
    model.train()
    data, out = batch(plan.rows), Outcome()
    total, share = token_count(data["input_ids"]), plan.rows // world // plan.accumulation
    _steer(layers, plan, rank * share * plan.accumulation, share)
    for step in range(plan.steps):
        losses = 0.0
        if balance is not None:
            balance.start_step(data["input_ids"].numel())
        for micro in range(plan.accumulation):
            first = (rank * plan.accumulation + micro) * share
            part = rows_of(data, slice(first, first + share))
            part["pixel_values"] = part["pixel_values"].to(plan.torch_dtype)
            if balance is not None:
                balance.start_micro_batch(None)
            with _watched(layers, out, step) as counter:
                logits = engine(**part, use_cache=False).logits
                loss = token_loss(logits, part["input_ids"])
                backward(engine, loss, total)
            if step == 0:
                out.logits = torch.cat([out.logits, logits.detach().float()])
                out.calls, out.bytes = dict(counter.calls), dict(counter.bytes)
            if step == 0 and micro + 1 == plan.accumulation:
                grads = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
                out.grads = {n: g.clone() for n, g in grads.items()}
            engine.step()
            losses += loss.detach()
            del logits, loss
        require_step_applied(engine, step)
        if balance is not None:
            load = balance.finish_step()
            out.balance.append(load.loss_balance)
            out.z.append(load.loss_z)
            out.agreement = load.router_agreement if step == 0 else out.agreement
        dist.all_reduce(losses)
        out.losses.append(float(losses) / total)
        out.norms.append(float(engine.get_global_grad_norm()))
        if plan.steps > 10 and step % 10 == 9:
            out.live.append(_live_tensors())
    out.input_grads = [grad / world for grad in out.input_grads]
    out.trace_complete = engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    engine.destroy()
    return out


class _watched:
    """Counts collectives, and notes each layer's input gradient and received rows, in the first step."""

    def __init__(self, layers: list[Any], out: Outcome, step: int) -> None:
        self.layers, self.out, self.counter = layers if step == 0 else [], out, CollectiveCounter()
        self.hooks: list[Any] = []

    def __enter__(self) -> CollectiveCounter:
        for index, layer in enumerate(self.layers):
            if not layer.training:
                continue
            self.hooks.append(layer.register_forward_pre_hook(self._input_hook(index)))
            self.hooks.append(
                layer.experts.register_forward_pre_hook(lambda _, args: self.out.received.append(len(args[0])))
            )
        self.counter.__enter__()
        return self.counter

    def _input_hook(self, index: int) -> Callable[..., None]:
        def keep(grad: Tensor) -> None:
            grads = self.out.input_grads
            if len(grads) <= index:
                grads.extend([torch.empty(0)] * (index + 1 - len(grads)))
            grads[index] = torch.cat([grads[index], grad.detach().float()])

        def hook(_: Any, args: Any) -> None:
            # a recompute discards its graph: only the input of the first pass gets a gradient
            if args[0].requires_grad:
                args[0].register_hook(keep)

        return hook

    def __exit__(self, *error: Any) -> None:
        self.counter.__exit__(*error)
        for hook in self.hooks:
            hook.remove()


def _steer(layers: list[Any], plan: Plan, first_row: int, rows: int) -> None:
    """Force or inject routing by adding to the logits in float32, which does not change the normalised scores."""
    for index, layer in enumerate(layers):
        if plan.bias:
            bias = torch.tensor(plan.bias)
            layer.gate.register_forward_hook(lambda _, args, out, bias=bias: (out[0] + bias, out[1]))
        if plan.topk:
            chosen = plan.topk[index].view(plan.rows, -1, plan.topk[index].shape[-1])[first_row : first_row + rows]
            mask = torch.zeros(chosen.shape[0] * chosen.shape[1], layer.num_experts).scatter_(
                1, chosen.flatten(0, 1), 30.0
            )
            layer.gate.register_forward_hook(lambda _, args, out, mask=mask: (out[0].float() + mask, out[1]))


def _live_tensors() -> tuple[int, int]:
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return len(tensors), sum(t.numel() * t.element_size() for t in tensors if not t.is_meta)


def whole(outcomes: list[Outcome], ep: int) -> dict[str, Tensor]:
    """Join the gradients of an expert-parallel group's ranks by concatenating the local experts."""
    first = outcomes[0].grads
    return {
        name: torch.cat([outcomes[rank].grads[name] for rank in range(ep)]) if ".experts." in name else grad
        for name, grad in first.items()
    }

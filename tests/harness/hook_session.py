"""The ranks of the hook tests: they train and evaluate in turns, and return what the engine's hooks left behind."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import nn

from benchmarks.harness.collectives import CollectiveCounter
from benchmarks.planner.plan_case import Case, packed_row
from data.render.vision import read_spec
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.model.divergence import compare_row
from finetune.model.forward import PackedModel
from finetune.model.lora import adapters_off
from finetune.model.loss import row_losses
from finetune.model.row import Row
from finetune.model.weights import load_weights
from finetune.ranks.engine import (
    EngineOptions,
    backward,
    engine_config,
    engine_device,
    initialize,
    require_step_applied,
    start_distributed,
)
from finetune.training.evaluation import untouched
from finetune.training.setup import model_options, save_memory

ROWS, HELD_OUT = 2, 3
"""Rows per rank: the first one records the order of modules, and the later ones follow it."""
OPTIONS = EngineOptions(dtype="float32", lr=1e-3, eps=1e-6)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine; with `stock`, DeepSpeed alone starts it and adds all its hooks."""

    vision: str = "lora"
    recompute: str = "selective"
    resident: str = "frozen"
    dropout: float = 0.0
    threshold: int | None = None
    stock: bool = False

    def words(self) -> tuple[str, ...]:
        """The overrides of the recipe."""
        dropped = (
            ["attention", "experts", *(["vision_blocks"] if self.vision == "lora" else [])] if self.dropout else []
        )
        return (
            "model.dtype=float32",
            "parallel.ep=1",
            f"adapters.vision_blocks.mode={self.vision}",
            f"parallel.recompute={self.recompute}",
            f"parallel.resident={self.resident}",
            *[f"adapters.{family}.dropout={self.dropout}" for family in dropped],
        )


@dataclass(kw_only=True)
class Told:
    """The observations of one rank."""

    numbers: list[float] = field(default_factory=list)
    """Losses and gradient norms, which do not depend on how weights are fetched."""
    hooks: int = 0
    stack: list[int] = field(default_factory=list)
    """Modules on the engine's stack after each backward."""
    missing: list[int] = field(default_factory=list)
    """Kept parameters that were partitioned at each forward, except those of modules with hooks."""
    follows: list[bool] = field(default_factory=list)
    """True for each forward at which the engine knew the order of modules."""
    left: list[int] = field(default_factory=list)
    """Elements of fetched parameters that were still gathered after each backward."""
    averaged: list[int] = field(default_factory=list)
    """The number of times that each backward averaged gradients over ranks."""
    external: list[tuple[str, str]] = field(default_factory=list)
    """Parameters that the engine saw being read outside their module, and where it noted them."""


def session(rank: int, world: int, base: Path, jobs: list[Job]) -> list[Told]:
    """Run the engines in turn."""
    start_distributed()
    return [_run(rank, world, base, job) for job in jobs]


def _run(rank: int, world: int, base: Path, job: Job) -> Told:
    case, told = Case(words=job.words(), samples=(18, 27), images=((1, 4, 4),), videos=((2, 4, 2),)), Told()
    engine = _start(base, case, job)
    order = engine.optimizer.parameter_offload.get_param_coordinator()
    engine.module.register_forward_pre_hook(lambda *_: told.missing.append(_missing(engine)))
    engine.module.register_forward_pre_hook(lambda *_: told.follows.append(order.is_complete_trace()))
    rows = [
        packed_row(case, read_family(base), read_spec(base), row=rank + world * number)
        for number in range(2 * ROWS + HELD_OUT)
    ]
    torch.manual_seed(rank)
    for trained, measure in ((rows[:ROWS], None), (rows[ROWS : 2 * ROWS], _twice)):
        for number, row in enumerate(trained):
            engine.set_gradient_accumulation_boundary(number == ROWS - 1)
            objective = engine(batch=row) if measure is None else engine(batch=row, measure=measure)
            objective = objective if measure else objective.objective
            with CollectiveCounter() as counter:
                backward(engine, objective, float(row.input_ids.numel() * ROWS * world))
            told.averaged.append(sum(n for kind, n in counter.calls.items() if kind.collective == "reduce_scatter"))
            told.numbers.append(float(objective.detach()))
            told.stack.append(len(FWD_MODULE_STACK))
            fetched = [p for p in engine.module.parameters() if not p.ds_persist]
            told.left.append(sum(p.ds_numel for p in fetched if p.ds_status.name == "AVAILABLE"))
        engine.step()
        require_step_applied(engine, 0)
        told.numbers.append(float(engine.get_global_grad_norm()))
        with untouched(engine):
            for row in rows[2 * ROWS :]:
                found = engine(batch=row, measure=partial(compare_row, with_base=True))
                told.numbers += [float(found.ce_N.sum()), float(found.base_ce_N.sum())]
    told.external = list(_external(engine.module))
    offload = engine.optimizer.parameter_offload
    told.hooks = len(offload.forward_hooks) + len(offload.backward_hooks)
    engine.destroy()
    return told


def _start(base: Path, case: Case, job: Job) -> Any:
    config = case.config(f"model.path={base}")
    options = OPTIONS if job.threshold is None else replace(OPTIONS, persistence_threshold=job.threshold)
    empty = build(base, model_options(config, read_family(base), engine_device(), lambda _: None))
    load_weights(empty, open_base(base, empty.expected), engine_config=engine_config(options))
    packed = PackedModel(empty.module, spec=read_spec(base))
    save_memory(packed, config)
    if job.stock:
        trained = [parameter for parameter in packed.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=0)
        engine, *_ = deepspeed.initialize(model=packed, optimizer=optimizer, config=engine_config(options))
    else:
        engine = initialize(packed, options)
    engine.train()
    return engine


def _twice(packed: PackedModel, row: Row) -> torch.Tensor:
    """Run two training passes and one of the base in one forward: more than preference training or distillation."""
    with torch.no_grad(), adapters_off(packed):
        base_TD = packed.hidden(row)
    first_TD, second_TD = packed.hidden(row), packed.hidden(row)
    losses = [row_losses(packed.model.lm_head, hidden_TD, row, "token") for hidden_TD in (first_TD, second_TD)]
    return losses[0].objective + 0.5 * losses[1].objective + 0.1 * (second_TD - base_TD).square().sum()


def _missing(engine: Any) -> int:
    kept = {id(p) for p in engine.optimizer.persistent_parameters}
    found = 0
    for module in engine.module.modules():
        own = [p for p in module.parameters(recurse=False)]
        if all(id(p) in kept for p in own):
            found += sum(p.ds_status.name != "AVAILABLE" for p in own)
    return found


def _external(model: nn.Module) -> Iterator[tuple[str, str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for place, module in model.named_modules():
        for key in getattr(module, "_external_params", {}):
            yield names[key], place

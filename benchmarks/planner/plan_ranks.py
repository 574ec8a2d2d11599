"""Run a real engine on a tiny base, and count its memory, collectives and operations for comparison with plans."""

import contextlib
import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.collectives import CollectiveCounter
from benchmarks.harness.memory import Allocations
from benchmarks.planner.plan_case import Case, packed_row
from data.render.vision import read_spec
from data.stream.batch import Batch
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.model.forward import PackedModel
from finetune.model.sequence import sequence_groups
from finetune.model.sequence_attention import use_sequence
from finetune.model.weights import load_weights
from finetune.ranks.collectives import rank_and_world
from finetune.ranks.engine import backward, engine_config, engine_device, initialize, start_distributed
from finetune.training.setup import engine_options, make_balance, model_options, save_memory, share_rows
from moe.host import to_host

MICRO_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The memory and traffic of one rank."""

    static: int
    """Bytes of all storages alive between two steps."""
    weights: int
    """Bytes of parameters and buffers, and of this rank's slices of partitioned parameters."""
    masters: int
    moments: int
    gradients: int
    peak: int
    """Bytes of all storages alive at the peak of a step."""
    flops: int
    """Operations of a step, as torch counts them."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of a step, by collective, size of its group and data type."""
    leaving: dict[str, int] = field(default_factory=dict)
    """Bytes of the all-to-alls that went to other ranks."""
    chosen: list[list[int]] = field(default_factory=list)
    """How often this rank's tokens chose each expert in a step, by layer and expert."""


def between_ranks(counted: dict[str, int], collective: str) -> int:
    """Return the bytes of one collective, without groups of one rank."""
    names = {name: name.split("/") for name in counted}
    return sum(counted[name] for name, (kind, ranks, _) in names.items() if kind == collective and int(ranks) > 1)


def session(base: Path, cases: list[Case]) -> list[Measured]:
    """Run the cases in turn; every rank must call this with its process group up."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # the engine calls collectives by their old names
    return [measure(base, case) for case in cases]


def measure(base: Path, case: Case) -> Measured:
    """Run a few steps of one case, and count in them."""
    start_distributed()
    row = rank_and_world()[0] // case.config().parallel.sp
    batch = packed_row(case, read_family(base), read_spec(base), row=row)
    to_host(torch.empty(1))  # allocates the block of host memory for activations, which is not device memory
    gc.collect()
    gc.freeze()  # earlier objects are not the engine's, and scanning a million of them each time is slow
    engine, balance = _start(base, case)
    _step(engine, balance, batch)  # creates moments and persistent parameters
    gc.collect()
    static = _bytes(_alive())
    with FlopCounterMode(display=False, custom_mapping=_uncounted()) as operations, CollectiveCounter() as sent:
        chosen = _step(engine, balance, batch)
    gc.collect()
    static = max(static, _bytes(_alive()))
    with Allocations() as made:
        _step(engine, balance, batch)
    inputs = _bytes(value for value in vars(batch).values() if isinstance(value, Tensor))
    parameters = list(engine.module.parameters())
    optimizer = engine.optimizer
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    slices = vars(optimizer)["_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"]
    names = {kind: f"{kind.collective}/{kind.ranks}/{kind.dtype}" for kind in sent.bytes}
    measured = Measured(
        static=static,
        weights=_bytes([*engine.module.buffers(), *parameters, *(p.ds_tensor for p in parameters)]),
        masters=_bytes(optimizer.fp32_partitioned_groups_flat),
        moments=_bytes(value for value in states if isinstance(value, Tensor) and value.numel() > 1),
        gradients=_bytes(slices.values()),
        peak=static + inputs + made.peak_bytes,
        flops=operations.get_total_flops(),
        sent={names[kind]: size for kind, size in sent.bytes.items()},
        leaving={names[kind]: size for kind, size in sent.leaving.items()},
        chosen=chosen,
    )
    engine.destroy()
    gc.unfreeze()
    return measured


def _start(base: Path, case: Case) -> tuple[Any, Any]:
    """Start the engine as a run does; return it with the balance of its experts."""
    config, family = case.config(f"model.path={base}"), read_family(base)
    device = engine_device()
    groups = sequence_groups([config.parallel.sp])
    balance = make_balance(config, family, device)
    of_model = model_options(config, family, device, lambda text: None)
    empty = build(base, of_model, balance=balance)
    if config.parallel.sp > 1:
        use_sequence(empty.module, groups, of_model.attention)
    options = replace(
        engine_options(config),
        persistence_threshold=case.persistence,
        prefetch_elements=None if case.reuse else 0,
        extra={"zero_optimization": {"stage3_max_reuse_distance": case.reuse, "sub_group_size": case.sub_group}},
    )
    load_weights(empty, open_base(base, empty.expected), engine_config=engine_config(options))
    packed = PackedModel(empty.module, spec=read_spec(base))
    save_memory(packed, config)
    engine = initialize(packed, options)
    share_rows(packed, balance, groups[config.parallel.sp])
    engine.train()
    return engine, balance


def _step(engine: Any, balance: Any, batch: Batch) -> list[list[int]]:
    """Take one step of equal micro-batches; return how often this rank's tokens chose each layer's experts."""
    chosen: list[list[int]] = []
    rows = MICRO_BATCHES * engine.world_size // (engine.module.sequence.size if engine.module.sequence else 1)
    tokens = rows * batch.input_ids.numel()
    if balance is not None:
        balance.start_step(tokens)
    for number in range(MICRO_BATCHES):
        engine.set_gradient_accumulation_boundary(number == MICRO_BATCHES - 1)
        row = engine.module.send(batch, engine_device()).arrived()
        if balance is not None:
            balance.start_micro_batch(row.valid_T)
        losses = engine(batch=row)
        backward(engine, losses.objective, float(tokens))
        del losses
    if balance is not None:
        balance.end_micro_batch()
        chosen = balance.totals.counts_LE.int().tolist()  # this rank's, before finish_step sums over the ranks
        balance.finish_step()
    engine.step()
    return chosen


def _uncounted() -> dict[Any, Any]:
    """Return formulas for operations that torch's counter ignores: grouped products, and the CPU's attention."""

    def grouped(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * prod(x) * weight[-1]  # rows by matrices, or columns by rows for a matrix's own gradient

    def attention(
        q: tuple[int, ...],
        k: tuple[int, ...],
        v: tuple[int, ...],
        dropout: float = 0.0,
        is_causal: bool = False,
        *_: Any,
        **__: Any,
    ) -> int:
        return 4 * prod(q) * k[2] // (2 if is_causal else 1)

    def attention_backward(
        grad: tuple[int, ...],
        q: tuple[int, ...],
        k: tuple[int, ...],
        v: tuple[int, ...],
        out: Any,
        sums: Any,
        dropout: float,
        is_causal: bool,
        *_: Any,
        **__: Any,
    ) -> int:
        return 10 * prod(q) * k[2] // (2 if is_causal else 1)  # the scores again, and four gradients

    aten = torch.ops.aten
    return {
        aten._grouped_mm: grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }


def _alive() -> list[Tensor]:
    """Return all tensors that were created since gc.freeze."""
    tensors = []
    for thing in gc.get_objects():
        with contextlib.suppress(ReferenceError):  # a weak proxy whose object is gone
            if isinstance(thing, Tensor) and thing.device.type == "cpu":
                tensors.append(thing)
    return tensors


def _id_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, counting a shared storage once."""
    return sum({_id_of(t): t.untyped_storage().nbytes() for t in tensors}.values())

"""What ranks do for the planner's tests: a real engine on a tiny base, its memory and its collectives counted."""

import contextlib
import gc
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from packed_rows import sample
from torch import Tensor

from benchmarks.collectives import CollectiveCounter
from benchmarks.memory import Allocations
from data.batch import Batch, collate
from data.sample import Sample
from data.vision import read_spec
from finetune.basefiles import open_base
from finetune.engine import backward, engine_config, engine_device, initialize, start_distributed
from finetune.forward import PackedModel
from finetune.hubconfig import read_family
from finetune.model import build
from finetune.recipes import load as load_recipe
from finetune.recompute import set_recompute
from finetune.sequence import sequence_groups
from finetune.sequence_attention import use_sequence
from finetune.setup import engine_options, make_balance, model_options, share_rows
from finetune.weights import load

MICRO_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: the tiny recipe with these values, and the samples of each rank's row by their tokens."""

    words: tuple[str, ...]
    samples: tuple[int, ...] = (96, 160)
    supervised: int = 1
    """One token in so many."""
    persistence: int = 1_000_000
    reuse: int = 1_000_000_000
    """Elements within which the engine keeps what it gathered; with 0 it fetches nothing ahead either."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank held and sent."""

    static: int
    """Every storage alive between two steps."""
    masters: int
    moments: int
    gradients: int
    peak: int
    """Every storage alive at the highest point of a step."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of a whole step, by collective and type."""


def text_row(lengths: tuple[int, ...], vocabulary: int, every: int) -> Batch:
    """Samples of so many tokens, all of them supervised."""
    samples = []
    for seed, length in enumerate(lengths):
        weights = (np.arange(length) % every == 0).astype(np.float32)
        ids = np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32)
        plain = sample("", length=0, seed=seed)
        positions = np.tile(np.arange(length, dtype=np.int64), (4, 1))
        samples.append(
            Sample(
                key=str(seed), input_ids=ids, loss_weights=weights, positions=positions,
                image_patches=plain.image_patches, image_grids=plain.image_grids,
                video_patches=plain.video_patches, video_grids=plain.video_grids,
            )
        )  # fmt: skip
    return collate(
        samples, keys=[item.key for item in samples], pad_id=0, multiple=1,
        widths=(plain.image_patches.shape[1], plain.video_patches.shape[1]),
    )  # fmt: skip


def session(rank: int, world: int, base: Path, cases: list[Case]) -> list[Measured]:
    warnings.filterwarnings("ignore", category=FutureWarning)  # the engine calls collectives by their old names
    return [measure(base, case) for case in cases]


def measure(base: Path, case: Case) -> Measured:
    start_distributed()
    config, problems = load_recipe("tiny-cpu", [f"model.path={base}", *case.words])
    assert not problems, problems
    gc.collect()
    before = {id_of(tensor) for tensor in alive()}
    device, shape = engine_device(), read_family(base)
    groups = sequence_groups([config.parallel.sp])
    balance = make_balance(config, shape, device)
    chosen = model_options(config, shape, device, lambda text: None)
    empty = build(base, chosen, balance=balance)
    if config.parallel.sp > 1:
        use_sequence(empty.module, groups, chosen.attention)
    options = replace(
        engine_options(config),
        persistence_threshold=case.persistence,
        prefetch_elements=None if case.reuse else 0,
        extra={"zero_optimization": {"stage3_max_reuse_distance": case.reuse}},
    )
    files = open_base(base, empty.expected)
    load(empty, files, engine_config=engine_config(options))
    set_recompute(empty.module, config.parallel.recompute)
    packed = PackedModel(empty.module, spec=read_spec(base))
    engine = initialize(packed, options)
    share_rows(packed, balance, groups[config.parallel.sp])
    engine.train()
    batch = text_row(case.samples, shape.text.vocab_size - 40, case.supervised)
    step(engine, balance, batch)  # moments and persistent parameters are made
    gc.collect()
    static = sum_storages([t for t in alive() if id_of(t) not in before])
    with CollectiveCounter() as sent:
        step(engine, balance, batch)
    gc.collect()
    static_after = sum_storages([t for t in alive() if id_of(t) not in before])
    with Allocations() as made:
        step(engine, balance, batch)
    optimizer = engine.optimizer
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    slices = vars(optimizer)["_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"]
    found = Measured(
        static=max(static, static_after),
        masters=sum_storages(optimizer.fp32_partitioned_groups_flat),
        moments=sum_storages([v for v in states if isinstance(v, Tensor) and v.numel() > 1]),
        gradients=sum_storages(slices.values()),
        peak=max(static, static_after) + made.peak_bytes,
        sent={f"{k.collective}/{k.ranks}/{k.dtype}": size for k, size in sent.bytes.items()},
    )
    engine.destroy()
    return found


def step(engine: Any, balance: Any, batch: Batch) -> None:
    rows = MICRO_BATCHES * engine.world_size // (engine.module.sequence.size if engine.module.sequence else 1)
    tokens = rows * batch.input_ids.numel()
    if balance is not None:
        balance.start_step(tokens)
    for number in range(MICRO_BATCHES):
        engine.set_gradient_accumulation_boundary(number == MICRO_BATCHES - 1)
        if balance is not None:
            balance.start_micro_batch(engine.module.valid(batch))
        losses = engine(batch=batch)
        backward(engine, losses.objective, float(tokens))
        del losses
    if balance is not None:
        balance.finish_step()
    engine.step()


def alive() -> list[Tensor]:
    found = []
    for thing in gc.get_objects():
        with contextlib.suppress(ReferenceError):  # a weak proxy whose object is gone
            if isinstance(thing, Tensor) and thing.device.type == "cpu":
                found.append(thing)
    return found


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def sum_storages(tensors: Any) -> int:
    return sum({id_of(t): t.untyped_storage().nbytes() for t in tensors}.values())

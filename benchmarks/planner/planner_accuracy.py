"""`planner-accuracy`: the planner's predictions for a run over the values counted in it, at several layouts."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.figure import Figure, at_most
from benchmarks.harness.spawned import on_ranks
from benchmarks.planner.plan_case import COLLECTIVES, FULL, Case, collective_of, packed_row, write_base
from benchmarks.planner.plan_ranks import MICRO_BATCHES, Measured, between_ranks, session
from data.render.vision import read_spec
from finetune.architecture.families import Family
from finetune.architecture.flops import FlopMeter, batch_work, trainings
from finetune.files.hubconfig import read_family
from finetune.planner.gpus import cluster
from finetune.planner.memory import memory
from finetune.planner.wire import traffic

WORLD, SMALL = 2, 1000
BOUND, PEAK_BOUND = 0.05, 0.10
LORA = ("parallel.ep=2", "adapters.router.mode=frozen", "model.dtype=float32")
TEXT = (*LORA, "adapters.vision_blocks.mode=frozen", "adapters.merger.mode=frozen")
LAYOUTS = {
    "LoRA with the tower, resident, recompute selective": (*LORA, "parallel.resident=frozen"),
    "LoRA, partitioned, recompute by layer": (*TEXT, "parallel.resident=none", "parallel.recompute=layer"),
    "full fine-tuning, no recompute": (
        *FULL,
        "parallel.ep=1",
        "parallel.resident=none",
        "parallel.recompute=none",
        "model.dtype=float32",
    ),
    "LoRA, resident, rows over two ranks": (*TEXT, "parallel.resident=frozen", "parallel.sp=2"),
}


def run() -> Iterator[Figure]:
    """Yield the error of each prediction: memory by component, peak, bytes by kind, operations."""
    cases = [
        Case(words=words, samples=(260, 124), images=((1, 16, 16), (1, 16, 16)), supervised=16, persistence=SMALL)
        for words in LAYOUTS.values()
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = write_base(Path(name) / "base")
        ranks = on_ranks(WORLD, session, folder, cases)
        for at, (layout, case) in enumerate(zip(LAYOUTS, cases, strict=True)):
            of_ranks = [rank[at] for rank in ranks]
            for what, predicted, measured in _pairs(case, read_family(folder), of_ranks, folder):
                yield _figure(layout, what, predicted, measured)


def _pairs(case: Case, base: Family, ranks: list[Measured], folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yield predicted and measured values: memory of the fullest rank, mean bytes and operations over the ranks."""
    config, layout = case.config(), case.layout(base, WORLD)
    planned = memory(config, base, layout)
    engine = ("masters", "optimiser", "gradients", "gradient bucket")
    weights = sum(size for name, size in planned.always.items() if name not in engine)
    yield "weights", weights, max(rank.weights for rank in ranks)
    for name, attribute in (("masters", "masters"), ("optimiser", "moments"), ("gradients", "gradients")):
        yield name, planned.always[name], max(getattr(rank, attribute) for rank in ranks)
    yield "between steps", planned.static, max(rank.static for rank in ranks)
    yield "peak", planned.peak, max(rank.peak for rank in ranks)
    here = cluster("h100-80gb", gpus=WORLD, per_node=None, price=None)
    sent = traffic(config, base, layout, here, micro_batches=MICRO_BATCHES)
    for kind in COLLECTIVES:
        foreseen = [each for each in sent if collective_of(each) == kind]
        counted = sum(between_ranks(rank.sent, kind) for rank in ranks) / WORLD
        if counted or foreseen:
            yield f"bytes of {kind}", sum(each.bytes for each in foreseen), counted
    left = sum(between_ranks(rank.leaving, "all_to_all_single") for rank in ranks) / WORLD
    if left:
        yield "bytes that leave a rank", sum(each.leaving for each in sent if each.exchange), left
    meter = FlopMeter(base, trainings(config.adapters), recompute=layout.recompute)
    rows = MICRO_BATCHES / layout.sp
    operations = rows * meter.hardware(batch_work(packed_row(case, base, read_spec(folder))))
    yield "operations", operations, sum(rank.flops for rank in ranks) / WORLD


def _figure(layout: str, what: str, predicted: float, measured: float) -> Figure:
    ratio = predicted / measured if measured else float("inf")
    return Figure(
        f"{layout}: {what}, predicted over measured, off by",
        abs(ratio - 1),
        "",
        config={"predicted": predicted, "measured": measured, "ratio": round(ratio, 4), "ranks": WORLD},
        target=at_most(PEAK_BOUND if what == "peak" else BOUND),
    )

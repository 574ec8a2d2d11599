"""Compares the planner with real engines on ranks: memory between steps, peak memory and traffic."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from ranks import run_ranks

from benchmarks.planner.plan_case import COLLECTIVES, FULL, Case, collective_of, write_base
from benchmarks.planner.plan_ranks import MICRO_BATCHES, Measured, between_ranks, session
from finetune.architecture.families import Family
from finetune.config import RunConfig
from finetune.files.hubconfig import read_family
from finetune.planner.activations import Reach
from finetune.planner.gpus import cluster
from finetune.planner.memory import memory
from finetune.planner.moments import micro_batch
from finetune.planner.rank_layout import RankLayout
from finetune.planner.wire import Traffic, exchanged, traffic

SMALL = 1000
"""Elements below which a tensor stays gathered between steps; the real limit exceeds every tensor of the tiny model."""

TEXT = ("adapters.router.mode=frozen", "adapters.vision_blocks.mode=frozen", "adapters.merger.mode=frozen")
"""LoRA on attention and experts. The recipe itself also trains the router and the tower."""
TOWER = ("adapters.router.mode=frozen",)
DENSE = ("adapters.experts.mode=frozen", *TOWER)
IMAGES = {"samples": (260, 124), "images": ((1, 16, 16), (1, 16, 16))}
QUANTISED = tuple((f"model.quantise.experts={bits}", f"model.quantise.dense={bits}") for bits in ("nf4", "int8"))
LONG = {"samples": (3000, 1200)}
"""Rows whose hidden states are large enough to go to the host."""


def _case(ep: int, resident: str, recompute: str, *more: str, trains=TEXT, sp: int = 1, reuse=1_000_000_000, **row):
    words = (f"parallel.ep={ep}", f"parallel.resident={resident}", f"parallel.recompute={recompute}")
    words += (f"parallel.sp={sp}", "model.dtype=float32") if sp > 1 else ("model.dtype=float32",)
    row = {"samples": (180, 76), "supervised": 16, **row}
    return Case(words=(*words, *trains, *more), persistence=SMALL, reuse=reuse, **row)


STARTS = {
    "1 rank": (
        1,
        8,
        [
            _case(1, "frozen", "layer", "model.dtype=bfloat16", "optim.moments=bfloat16", trains=TOWER, **IMAGES),
            _case(1, "frozen", "layer", trains=TOWER, samples=(260, 124), videos=((2, 16, 16),)),
        ],
    ),
    "2 ranks": (
        2,
        8,
        [
            _case(2, "frozen", "selective", trains=TOWER, supervised=1, **IMAGES),
            _case(2, "none", "layer", **IMAGES),
            _case(2, "frozen", "layer", sp=2),
        ],
    ),
    "1 rank more": (
        1,
        8,
        [
            _case(1, "frozen", "none", trains=(*TOWER, *FULL[3:4], "adapters.patch_embed.mode=full"), **IMAGES),
            *(_case(1, "frozen", mode, "parallel.tile_tokens=1024", **LONG) for mode in ("none", "layer", "selective")),
            *(
                _case(1, "frozen", mode, "parallel.offload_activations=true", "parallel.tile_tokens=1024", **LONG)
                for mode in ("layer", "selective")
            ),
            *(_case(1, "frozen", mode, "parallel.offload_activations=true", **LONG) for mode in ("layer", "selective")),
            *(_case(1, "frozen", mode, trains=FULL, **IMAGES) for mode in ("none", "layer")),
            *(_case(1, "frozen", mode, trains=TOWER, **IMAGES) for mode in ("none", "selective")),
            *(
                replace(_case(1, "frozen", "layer", trains=FULL, samples=(24, 8)), sub_group=size)
                for size in (10**5, 10**9)
            ),
            _case(1, "frozen", "none", "model.dtype=bfloat16", **IMAGES),
        ],
    ),
    "2 ranks more": (
        2,
        8,
        [
            _case(1, "none", "none", trains=FULL, **IMAGES),
            _case(2, "frozen", "none", "parallel.tile_tokens=64"),
            _case(1, "none", "layer", reuse=0),
            _case(2, "none", "none", "adapters.experts.mode=frozen"),
            *(_case(2, "frozen", mode, trains=TOWER, sp=2, **IMAGES) for mode in ("selective", "none")),
            *(_case(2, "none", mode, **IMAGES) for mode in ("none", "selective")),
            _case(2, "none", "layer", trains=FULL, **IMAGES),
            *(_case(2, "none", mode, trains=TOWER, **IMAGES) for mode in ("none", "layer")),
            _case(2, "none", "none", trains=TEXT[:2], **IMAGES),
            *(_case(2, "frozen", mode, "parallel.tile_tokens=64") for mode in ("layer", "selective")),
            _case(2, "frozen", "layer", "adapters.attention.mode=frozen"),
            _case(
                2,
                "frozen",
                "layer",
                "adapters.attention.mode=frozen",
                "adapters.experts.mode=frozen",
                "adapters.head.mode=full",
            ),
        ],
    ),
    "2 ranks, dense": (
        2,
        None,
        [
            *(_case(1, "frozen", mode, trains=(*DENSE, *TEXT[1:])) for mode in ("none", "layer")),
            *(
                _case(1, "frozen", mode, "adapters.mlp.mode=lora", trains=(*DENSE, *TEXT[1:]), **IMAGES)
                for mode in ("none", "selective")
            ),
            *(
                _case(1, "none", mode, "adapters.mlp.mode=full", trains=(*FULL, *DENSE), **IMAGES)
                for mode in ("none", "layer")
            ),
        ],
    ),
    "2 ranks, quantised": (
        2,
        8,
        [
            _case(2, "frozen", "layer", *QUANTISED[0], **IMAGES),
            _case(2, "frozen", "selective", *QUANTISED[1]),
            _case(1, "none", "selective", *QUANTISED[0]),
            _case(2, "none", "none", *QUANTISED[1]),
        ],
    ),
    "4 ranks": (
        4,
        8,
        [
            _case(1, "frozen", "none"),
            _case(2, "none", "selective", "adapters.experts.r=16", trains=TEXT[1:]),
            _case(2, "none", "layer"),
            _case(4, "frozen", "none", sp=2),
            _case(4, "none", "layer", trains=TOWER, **IMAGES),
            _case(2, "none", "selective", trains=FULL, **IMAGES),
            _case(1, "none", "none", sp=4, **IMAGES),
        ],
    ),
}
DEFAULT = ("1 rank", "2 ranks")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planned")


@cache
def _measured(bases: Path, start: str) -> tuple[Family, list[list[Measured]]]:
    """Return the base, and for each case the measurements of all ranks."""
    world, experts, cases = STARTS[start]
    folder = bases / ("dense" if experts is None else "sparse")
    if not folder.exists():
        write_base(folder, experts=experts)
    ranks = run_ranks(_session, world, folder, cases)
    return read_family(folder), [list(of_case) for of_case in zip(*ranks, strict=True)]


def _session(rank: int, world: int, base: Path, cases: list[Case]) -> list[Measured]:
    return session(base, cases)


EVERY = [
    pytest.param(start, number, id=f"{start} {number}", marks=[] if start in DEFAULT else [pytest.mark.slow])
    for start, (_, _, cases) in STARTS.items()
    for number in range(len(cases))
]


@pytest.mark.parametrize(("start", "number"), EVERY)
def test_memory_and_traffic_of_ranks_match_the_plan(start: str, number: int, bases: Path) -> None:
    family, measured = _measured(bases, start)
    world, _, cases = STARTS[start]
    ranks, case = measured[number], cases[number]
    config, layout = case.config(), case.layout(family, world)
    planned = memory(config, family, layout)
    for rank in ranks:
        assert planned.always["masters"] == rank.masters  # to the byte
        assert planned.always["optimiser"] == rank.moments
        assert planned.always["gradients"] == rank.gradients
        assert planned.static == pytest.approx(rank.static, rel=0.05)
        assert planned.peak == pytest.approx(rank.peak, rel=0.10)
        if rank.peak > 1.2 * rank.static:  # and without the part that always exists
            assert planned.highest.total == pytest.approx(rank.peak - rank.static, rel=0.20)
    here = cluster("h100-80gb", gpus=world, per_node=None, price=None)
    sent = traffic(config, family, layout, here, micro_batches=MICRO_BATCHES)
    for collective in COLLECTIVES:
        foreseen = [kind for kind in sent if collective_of(kind) == collective]
        counted = sum(between_ranks(rank.sent, collective) for rank in ranks) / world
        assert sum(kind.bytes for kind in foreseen) == pytest.approx(counted, rel=0.05)
        if collective == "all_to_all_single":
            gone = sum(between_ranks(rank.leaving, collective) for rank in ranks) / world
            assert sum(kind.leaving for kind in foreseen) == pytest.approx(gone, rel=0.05)
    if not _depends_on_more(config, layout):
        _assert_exact_traffic(config, family, layout, ranks, sent)


def _depends_on_more(config: RunConfig, layout: RankLayout) -> bool:
    """Return whether bytes depend on the places of images in a row, or on the rows of a layer's last tile."""
    sees = layout.sp > 1 and config.data.vision_tokens_per_pack > 1
    return sees or (layout.tile_tokens > 0 and layout.recompute != "none")


def _assert_exact_traffic(
    config: RunConfig, family: Family, layout: RankLayout, ranks: list[Measured], sent: list[Traffic]
) -> None:
    """Assert that the planner's formula gives the exact bytes for the rows that ranks sent to each other."""
    others = [entry for entry in sent if entry.exchange and entry.kind != "expert rows"]
    tiles, reach = micro_batch(config, family, layout).tiles, Reach.of(config.adapters)
    ep = layout.ep
    for number, rank in enumerate(ranks):
        first, here = number // ep * ep, number % ep
        group = [_by_owner(entry.chosen, ep) for entry in ranks[first : first + ep]]
        all_sent, gone = sum(entry.bytes for entry in others), sum(entry.leaving for entry in others)
        for layer in range(len(rank.chosen) if ep > 1 else 0):
            out, back = group[here][layer], [entry[layer][here] for entry in group]
            options = {"tiles": tiles, "reach": reach, "first": family.moe_layers[layer] == 0}
            all_sent += exchanged(family, layout, out=sum(out), back=sum(back), **options)
            gone += exchanged(family, layout, out=sum(out) - out[here], back=sum(back) - back[here], **options)
        assert between_ranks(rank.sent, "all_to_all_single") == all_sent
        assert between_ranks(rank.leaving, "all_to_all_single") == gone


def _by_owner(chosen: list[list[int]], ep: int) -> list[list[int]]:
    """Return, for each layer, the number of rows that go to each rank of the group."""
    return [[sum(layer[n : n + len(layer) // ep]) for n in range(0, len(layer), len(layer) // ep)] for layer in chosen]

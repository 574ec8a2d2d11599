"""The planner against real engines on ranks: what it says they hold, need at most and send, and what they do."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import plan_session
import pytest
from plan_session import MICRO_BATCHES, Case, Measured
from ranks import run_ranks

from finetune.families import Family
from finetune.gpus import cluster
from finetune.hubconfig import read_family
from finetune.plan_memory import Layout, Memory, memory
from finetune.plan_wire import traffic
from finetune.recipes import load
from finetune.tiny import TinyModel, write_tiny

FROZEN = ("adapters.router.mode=frozen", "adapters.vision_blocks.mode=frozen", "adapters.merger.mode=frozen")
SAMPLES = (180, 76)
SMALL = 1000
"""Of elements: below, a tensor stays whole between steps. The real limit is above every tensor of the tiny model."""


def _case(ep: int, resident: str, recompute: str, *more: str, sp: int = 1, supervised: int = 16) -> Case:
    words = (f"parallel.ep={ep}", f"parallel.resident={resident}", f"parallel.recompute={recompute}",
             f"parallel.sp={sp}", "model.dtype=float32")  # fmt: skip
    return Case(words=(*FROZEN, *words, *more), samples=SAMPLES, supervised=supervised, persistence=SMALL)


CASES = {
    ("2 ranks", 2): [_case(2, "frozen", "selective", supervised=1), _case(2, "none", "layer")],
    ("2 ranks more", 2): [
        replace(_case(1, "none", "layer"), reuse=0),
        _case(2, "none", "none", "adapters.experts.mode=frozen"),
        _case(2, "frozen", "layer", sp=2),
    ],
    ("4 ranks", 4): [
        _case(1, "frozen", "none"),
        _case(2, "none", "selective", "adapters.experts.r=16", "adapters.router.mode=full"),
        _case(2, "none", "layer"),
        _case(4, "frozen", "none", sp=2),
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned") / "base"
    write_tiny(folder, TinyModel(hidden=64, layers=6, expert_hidden=48, heads=4, kv_heads=2))
    return folder


@cache
def _measured(base: Path, start: tuple[str, int]) -> list[list[Measured]]:
    """Of each case, every rank's."""
    ranks = run_ranks(plan_session.session, start[1], base, CASES[start], timeout=240)
    return [list(of_case) for of_case in zip(*ranks, strict=True)]


def _planned(base: Path, world: int, case: Case) -> tuple[Family, Layout, Memory, dict[str, int]]:
    words = [*case.words, f"data.tokens_per_pack={sum(case.samples)}", "data.vision_tokens_per_pack=0"]
    config, problems = load("tiny-cpu", words)
    assert not problems
    family = read_family(base)
    layout = Layout(
        world=world, ep=config.parallel.ep, sp=config.parallel.sp, layers=family.text.num_hidden_layers,
        reuse=case.reuse,        resident=config.parallel.resident == "frozen",
        recompute=config.parallel.recompute, itemsize=4 if config.model.dtype == "float32" else 2, segmented=True,
        supervised_share=1 / case.supervised, device=False, persistence=case.persistence,
    )  # fmt: skip
    moved = traffic(
        config, family, layout, cluster("h100-80gb", gpus=world, per_node=None, price=None), micro_batches=MICRO_BATCHES
    )
    sent: dict[str, int] = {}
    for one in moved:
        kind = {"gradients": "reduce_scatter", "trained weights": "allgather", "frozen weights": "allgather"}.get(
            one.kind.partition(",")[0], "all_to_all_single"
        )
        sent[kind] = sent.get(kind, 0) + one.bytes
    return family, layout, memory(config, family, layout), sent


EVERY = [
    pytest.param(start, number, id=f"{start[0]}, {' '.join(word.partition('.')[2] for word in case.words[3:])}",
                 marks=[] if start[0] == "2 ranks" else [pytest.mark.slow])
    for start, cases in CASES.items()
    for number, case in enumerate(cases)
]  # fmt: skip


@pytest.mark.parametrize(("start", "number"), EVERY)
def test_what_ranks_hold_need_and_send(start: tuple[str, int], number: int, base: Path) -> None:
    ranks, case, world = _measured(base, start)[number], CASES[start][number], start[1]
    _, _, planned, sent = _planned(base, world, case)
    for rank in ranks:  # to the byte
        assert planned.always["masters"] == rank.masters
        assert planned.always["optimiser"] == rank.moments
        assert planned.always["gradients"] == rank.gradients
    static = max(rank.static for rank in ranks)
    assert planned.static == pytest.approx(static, rel=0.05)
    # between the calmest and the busiest rank: the plan is made for even experts here
    peaks = sorted(rank.peak for rank in ranks)
    assert peaks[0] * 0.90 <= planned.peak <= peaks[-1] * 1.10
    for kind in {key for rank in ranks for key in _by_collective(rank)}:
        counted = sum(_by_collective(rank).get(kind, 0) for rank in ranks) / world
        # which experts the rows go to is the router's choice: the larger side of an exchange is above the even share
        assert sent.get(kind, 0) == pytest.approx(counted, rel=0.10 if kind == "all_to_all_single" else 0.05), kind


def _by_collective(rank: Measured) -> dict[str, int]:
    """Bytes between ranks, without sums of a few numbers and without the exchange of a rank with itself."""
    found: dict[str, int] = {}
    for name, size in rank.sent.items():
        collective, ranks, _ = name.split("/")
        if int(ranks) > 1 and collective != "allreduce":
            found[collective] = found.get(collective, 0) + size
    return found

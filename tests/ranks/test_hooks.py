"""The engine's hooks: losses equal those with all hooks, and parameters without hooks are complete at every forward."""

import functools
from itertools import product
from pathlib import Path

import pytest
from hook_session import HELD_OUT, ROWS, Job, Told, session
from ranks import run_ranks

from finetune.files.tiny import TinyModel, write_tiny

MATRIX = [
    Job(vision=vision, recompute=recompute, resident=resident, dropout=dropout, threshold=threshold)
    for vision, recompute, resident, dropout, threshold in product(
        ("frozen", "lora", "full"), ("none", "layer", "selective"), ("frozen", "none"), (0.0, 0.2), (None, 0)
    )
]
CHOSEN = {
    1: [Job(vision="full", dropout=0.2, threshold=0)],
    2: [
        Job(),
        Job(recompute="layer", resident="none", threshold=0),
        Job(vision="frozen", recompute="layer", resident="none", threshold=400),  # modules with large and small ones
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hooks") / "base"
    write_tiny(folder, TinyModel(layers=2, vision_depth=2))
    return folder


def reference(job: Job) -> Job:
    """Compare with a run that keeps every hook; neither recompute nor the place of weights may change a loss."""
    return Job(vision=job.vision, dropout=job.dropout, recompute="none", stock=True)


@functools.cache
def found(base: Path, world: int, jobs: tuple[Job, ...]) -> dict[Job, list[Told]]:
    """Run all jobs and their references in one start; return the observations of each rank by job."""
    jobs = (*dict.fromkeys(map(reference, jobs)), *jobs)
    ranks = run_ranks(session, world, base, list(jobs))
    return {job: [rank[number] for rank in ranks] for number, job in enumerate(jobs)}


@pytest.mark.parametrize(("world", "job"), [(world, job) for world, jobs in CHOSEN.items() for job in jobs], ids=str)
def test_removed_hooks_change_no_loss(base: Path, world: int, job: Job) -> None:
    require_sound(job, found(base, world, tuple(CHOSEN[world])))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_removed_hooks_change_no_loss_in_other_forwards_and_backwards(base: Path, world: int) -> None:
    everything = found(base, world, tuple(MATRIX))
    for job in MATRIX:
        require_sound(job, everything)


def require_sound(job: Job, everything: dict[Job, list[Told]]) -> None:
    for rank, stock in zip(everything[job], everything[reference(job)], strict=True):
        assert rank.numbers == pytest.approx(stock.numbers, rel=1e-6), job
        assert rank.stack == [1] * 2 * ROWS, job
        assert not any(rank.missing), job
        assert rank.left == [0] * 2 * ROWS, job
        assert rank.averaged == [2] * 2 * ROWS, f"{job}: once for the experts of all layers, once for the rest"
        assert min(stock.averaged) > 2, "in the order of the layers, one after the other"
        recorded = [False, *[True] * (ROWS - 1), False, *[True] * (HELD_OUT - 1)]
        assert rank.follows == 2 * recorded, job
        if job.threshold is None:
            assert (rank.hooks, rank.external) == (0, []), f"{job}: all parameters of a tiny model are kept"
        else:
            assert 0 < rank.hooks < stock.hooks, job
            assert rank.external, f"{job}: a parameter read outside its module is noticed"
        for name, place in rank.external:
            assert not place or name.startswith(f"{place}."), f"{job}: {name} was taken for a parameter of {place}"

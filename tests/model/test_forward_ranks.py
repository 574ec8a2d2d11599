"""Ranks with text, images, videos, both or nothing, in every combination: no hang, and the gradients of one process."""

import functools

import pytest
from loss_session import FOURS, ONE_WAY, Case, Outcome, reference, session
from ranks import run_ranks

CASES = {
    (2, "all of it trains, partitioned"): Case(how="sqrt"),
    (2, "frozen tower, partitioned"): Case(train=("input_layernorm",), how="sample", rows=tuple(ONE_WAY)),
    (2, "frozen tower and head, resident"): Case(train=("input_layernorm",), resident=True, rows=tuple(ONE_WAY[:6])),
    (2, "merger alone"): Case(train=("visual.merger", "deepstack_merger"), recompute="layer", rows=tuple(ONE_WAY[2:6])),
    (2, "trained tower, recomputed"): Case(recompute="selective", rows=tuple(ONE_WAY[1:6])),
    (2, "dense, tied, frozen head"): Case(
        kind="dense", tied=True, train=("visual", "input_layernorm"), rows=tuple(ONE_WAY[:6])
    ),
    (2, "bfloat16"): Case(dtype="bfloat16", rows=tuple(ONE_WAY[:6])),
    (4, "all of it trains"): Case(rows=tuple(FOURS)),
}


@functools.cache
def outcomes(world: int) -> dict[str, list[Outcome]]:
    """Run all cases for `world` ranks in one start."""
    cases = {name: case for (size, name), case in CASES.items() if size == world}
    results = run_ranks(session, world, list(cases.values()))
    return {name: [rank[number] for rank in results] for number, name in enumerate(cases)}


SLOW = [pytest.param(*key, marks=[pytest.mark.slow] if key[0] == 4 else []) for key in CASES]


@pytest.mark.parametrize(("world", "name"), SLOW)
def test_ranks_with_different_media_train_like_one_process(world, name):
    case, ranks = CASES[world, name], outcomes(world)[name]
    expected = reference(case)
    half = case.dtype == "bfloat16"
    rests = case.resident and "visual" not in case.train  # nothing is gathered for the tower, so text skips it
    for number, rank in enumerate(ranks):
        shown = sum(any(row[number]) for row in case.rows) if rests else len(case.rows)
        assert (rank.tower_calls, rank.head_calls) == (shown, len(case.rows))
        assert rank.loss == pytest.approx(expected.loss, rel=2e-2 if half else 1e-5)
        for micro, sums in enumerate(rank.ce):
            assert sums == pytest.approx(expected.ce[micro * world + number], rel=6e-2 if half else 1e-5)
        assert rank.grads.keys() == expected.grads.keys()
        for key, grad in rank.grads.items():
            wanted = expected.grads[key]
            assert wanted.abs().max() > 0, key
            error = (grad - wanted).norm() / wanted.norm() if half else (grad - wanted).abs().max() / wanted.abs().max()
            assert error < (0.2 if half else 2e-4), (key, float(error))

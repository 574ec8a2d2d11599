"""`packing`: fill of packs and evenness of costs within a step, compared with samples that are just concatenated."""

from collections.abc import Iterator

import numpy as np

from benchmarks.harness.figure import Figure, Peer, at_least, at_most
from benchmarks.harness.measure import OutputsDiffer
from benchmarks.shards.corpus import MIX, mixed_lengths
from data.stream.pack import Ints, Packs, best_fit, group_steps
from data.stream.plan import Cost

SAMPLES = 200_000
RANKS = 64
FILL = at_least(0.99, goal=0.998)
BALANCE = at_most(1.1, goal=1.05)


def run() -> Iterator[Figure]:
    """Yield, for three budgets, the fill and the cost of the most expensive pack over the mean of its step."""
    for budget in (8192, 16384, 32768):
        tokens, patches = mixed_lengths(SAMPLES, budget)
        packs = best_fit(tokens, patches, token_budget=budget, patch_budget=4 * budget)
        _check(packs, tokens, budget)
        config = {"tokens_per_pack": budget, "samples": SAMPLES, "mix": MIX}
        strung = next_fit(tokens, budget)
        yield Figure(
            f"fill of packs at {budget}",
            float(tokens.sum()) / (len(packs) * budget),
            "of the budget",
            config=config,
            better="higher",
            peer=Peer("samples strung together", float(tokens.sum()) / (strung * budget)),
            target=FILL,
        )
        cost = packs.sums(tokens) + Cost().squared * packs.sums(tokens * tokens) + Cost().patch * packs.sums(patches)
        order = group_steps(cost, RANKS, window=32, rng=np.random.default_rng(0))
        yield Figure(
            f"dearest pack over the mean of its step at {budget}",
            _unevenness(cost[order]),
            "",
            config=config | {"ranks": RANKS, "window": "32 steps"},
            peer=Peer("packs shuffled", _unevenness(np.random.default_rng(0).permutation(cost))),
            target=BALANCE,
        )


def next_fit(tokens: Ints, budget: int) -> int:
    """Return the number of packs if each sample goes into the last pack or a new one."""
    count, used = 1, 0
    for length in tokens.tolist():
        if used + length > budget:
            count, used = count + 1, 0
        used += length
    return count


def _check(packs: Packs, tokens: Ints, budget: int) -> None:
    if sorted(packs.members.tolist()) != list(range(len(tokens))) or packs.sums(tokens).max() > budget:
        raise OutputsDiffer(f"packs of {budget} tokens lose or repeat samples, or are too long")


def _unevenness(cost: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    steps = cost[: len(cost) // RANKS * RANKS].reshape(-1, RANKS)
    return float(steps.max(1).sum() / steps.mean(1).sum())

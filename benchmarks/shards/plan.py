"""`plan`: time to plan an epoch of a million samples, as every rank does before the first step."""

from collections.abc import Iterator
from functools import partial

from benchmarks.harness.figure import Figure, at_most
from benchmarks.harness.measure import OutputsDiffer, Side, fastest, take_turns
from benchmarks.shards.corpus import MIX, mixed_units
from data.stream.plan import PlanSettings, make_plan

SAMPLES = 1_000_000
BUDGET = 8192
TARGET = at_most(4.0, goal=2.0)


def run() -> Iterator[Figure]:
    """Yield the seconds for a million samples, with the natural mixture and with given shares of two sources."""
    for mixture in ("natural", "tokens"):
        sources = [mixed_units("one", SAMPLES * 7 // 10, BUDGET), mixed_units("two", SAMPLES * 3 // 10, BUDGET)]
        settings = PlanSettings(
            seed=0,
            packs_per_step=64,
            tokens_per_pack=BUDGET,
            patches_per_pack=4 * BUDGET,
            mixture="tokens" if mixture == "tokens" else "natural",
            weights=(1.0, 1.0),
        )
        plan = make_plan(sources, settings, epoch=1)
        if plan.packs.members.tolist() != make_plan(sources, settings, epoch=1).packs.members.tolist():
            raise OutputsDiffer("two plans of the same epoch differ")
        (seconds,) = take_turns([Side(name="plan", run=partial(make_plan, sources, settings, epoch=1))], rounds=3)
        yield fastest(
            f"plan of a million samples, mixture {mixture}",
            seconds,
            "s",
            config={"samples": SAMPLES, "tokens_per_pack": BUDGET, "steps": plan.steps, "fill": plan.fill, "mix": MIX},
            target=TARGET,
        )

"""`gather-per-step`: how often frozen weights are gathered in one optimiser step, by its number of micro-batches."""

from collections.abc import Iterator

from benchmarks.experts.expert_ranks import Setup, count
from benchmarks.harness.figure import Figure, Target

WORLD = 2
MICRO_BATCHES = (1, 2, 4)


def run() -> Iterator[Figure]:
    """Yield bytes gathered a step: none where they are resident, once more with each micro-batch where partitioned."""
    resident = count([Setup(side="ours", resident=True, micro_batches=n) for n in MICRO_BATCHES], world=WORLD)
    partitioned = count([Setup(side="ours", micro_batches=n) for n in MICRO_BATCHES], world=WORLD)
    once = partitioned[0][0].step_gathers
    for number, kept, cut in zip(MICRO_BATCHES, resident, partitioned, strict=True):
        config = {"ranks": WORLD, "ep": WORLD, "micro_batches": number}
        yield Figure(
            metric="frozen weights gathered a step, resident", value=max(rank.step_gathers for rank in kept),
            unit="bytes", config=config, peer="partitioned by ZeRO-3", peer_value=max(r.step_gathers for r in cut),
            target=Target(of="value", rule="exactly", floor=0),
        )  # fmt: skip
        yield Figure(
            metric="frozen weights gathered a step, partitioned, over those of one micro-batch",
            value=max(rank.step_gathers for rank in cut) / once, unit="x", config=config,
            target=Target(of="value", rule="at most", floor=number),
        )  # fmt: skip

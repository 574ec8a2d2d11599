"""`gather-per-step`: frozen weights gathered per optimiser step, by number of micro-batches."""

from collections.abc import Iterator

from benchmarks.experts.expert_ranks import Setup, count
from benchmarks.harness.figure import Figure, Peer, at_most, exactly

WORLD = 2
MICRO_BATCHES = (1, 2, 4)


def run() -> Iterator[Figure]:
    """Yield bytes gathered per step: none for resident weights, once per micro-batch for partitioned ones."""
    resident = count([Setup(side="ours", resident=True, micro_batches=n) for n in MICRO_BATCHES], world=WORLD)
    partitioned = count([Setup(side="ours", micro_batches=n) for n in MICRO_BATCHES], world=WORLD)
    once = partitioned[0][0].step_gathers
    for number, of_resident, of_partitioned in zip(MICRO_BATCHES, resident, partitioned, strict=True):
        config = {"ranks": WORLD, "ep": WORLD, "micro_batches": number}
        yield Figure(
            "frozen weights gathered a step, resident",
            max(rank.step_gathers for rank in of_resident),
            "bytes",
            config=config,
            peer=Peer("partitioned by ZeRO-3", max(r.step_gathers for r in of_partitioned)),
            target=exactly(0),
        )
        yield Figure(
            "frozen weights gathered a step, partitioned, over those of one micro-batch",
            max(rank.step_gathers for rank in of_partitioned) / once,
            "x",
            config=config,
            target=at_most(number),
        )

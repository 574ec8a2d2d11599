"""`scaling-shape`: four times the experts at the same top-k is the same arithmetic; how much more does a step cost?"""

from collections.abc import Iterator

import torch

from benchmarks.expert_block import Pair, Shape, same_step
from benchmarks.figure import Figure, Target
from benchmarks.measure import spread, take_turns

FEW = Shape(hidden=1024, intermediate=384, experts=32)
MANY = Shape(hidden=1024, intermediate=384, experts=128)
TOKENS, ROUNDS = 512, 9
TARGET = Target(of="value", rule="at most", floor=1.3)


def run() -> Iterator[Figure]:
    """Yield the time at 128 experts over the time at 32, ours and PEFT's, all four in turns."""
    torch.set_num_threads(1)
    sides = []
    for shape in (FEW, MANY):
        pair = Pair(shape)
        ours, peer = pair.sides(pair.inputs(TOKENS))
        same_step(ours.run(), peer.run())
        sides += [ours, peer]
    ours_few, peer_few, ours_many, peer_many = take_turns(sides, rounds=ROUNDS)
    yield Figure(
        metric=f"step at {MANY.experts} experts over {FEW.experts}", value=min(ours_many) / min(ours_few), unit="x",
        config={**pair.config(TOKENS), "experts": [FEW.experts, MANY.experts], "statistic": "min"}, n=ROUNDS,
        spread={"ours": spread(ours_many), "peer": spread(peer_many)}, peer=pair.peer_name,
        peer_value=min(peer_many) / min(peer_few), target=TARGET,
    )  # fmt: skip

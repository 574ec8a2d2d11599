"""`moe-lora-step`: time of one expert block's forward and backward with LoRA, compared with PEFT."""

from collections.abc import Iterator

import torch

from benchmarks.experts.expert_block import Pair, Shape, same_step
from benchmarks.harness.figure import Figure, Target, ratio_at_least
from benchmarks.harness.measure import race

WIDE = Shape(hidden=1024, intermediate=384, experts=128)
NARROW = Shape(hidden=256, intermediate=96, experts=128)
# (shape, tokens, floor, goal, rounds)
CASES = (
    (WIDE, 512, 3.0, 4.5, 7),
    (WIDE, 2048, 1.5, 2.2, 7),
    (NARROW, 256, 0.9, 1.2, 25),
    (NARROW, 1024, 0.9, 1.2, 15),
    (NARROW, 4096, 0.9, 1.2, 9),
)


def run() -> Iterator[Figure]:
    """Yield one figure per shape and number of tokens, and one compared with PEFT on eager experts."""
    torch.set_num_threads(1)  # more threads would compete with other processes on a small machine
    pair: Pair | None = None
    for shape, tokens, floor, goal, rounds in CASES:
        if pair is None or pair.shape != shape:
            pair = Pair(shape)
        target = ratio_at_least(floor, goal=goal)
        yield _figure(pair, tokens, rounds, target)
    yield _figure(Pair(NARROW, implementation="eager"), 1024, 1, None)


def _figure(pair: Pair, tokens: int, rounds: int, target: Target | None) -> Figure:
    raced = race(*pair.sides(pair.inputs(tokens)), same=same_step, rounds=rounds)
    metric = f"step, D={pair.shape.hidden}, {tokens} tokens"
    return raced.figure(metric, config=pair.config(tokens), target=target)

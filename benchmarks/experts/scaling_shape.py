"""`scaling-shape`: the cost of four times the experts at the same top-k, which is the same arithmetic.

The rows per expert fall to a quarter, so each weight is used a quarter as often per read. To separate the cost of the
GEMM kernel from that of LoRA, the four frozen grouped GEMMs of a step are measured alone as well.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.experts.expert_block import Inputs, Pair, Shape, same_step
from benchmarks.harness.figure import Figure, Peer, at_most
from benchmarks.harness.measure import Side, spread, take_turns

FEW = Shape(hidden=1024, intermediate=384, experts=32)
MANY = Shape(hidden=1024, intermediate=384, experts=128)
CASES = ((512, 9), (2048, 4))  # tokens, rounds
TARGET = at_most(1.3)


def run() -> Iterator[Figure]:
    """Yield the time at 128 experts over the time at 32: for ours and PEFT, then for the frozen GEMMs."""
    torch.set_num_threads(1)
    pairs = [Pair(FEW), Pair(MANY)]
    for tokens, rounds in CASES:
        yield from _growth(pairs, tokens, rounds)


def _growth(pairs: list[Pair], tokens: int, rounds: int) -> Iterator[Figure]:
    sides = []
    for pair in pairs:
        inputs = pair.inputs(tokens)
        ours, peer = pair.sides(inputs)
        same_step(ours.run(), peer.run())
        sides += [ours, peer, Side(name="frozen GEMMs", run=_frozen_gemms(pair, inputs))]
    seconds = take_turns(sides, rounds=rounds)
    ours_x, peer_x, frozen_x = (min(many) / min(few) for few, many in zip(seconds[:3], seconds[3:], strict=True))
    few, many = (pair.shape.experts for pair in pairs)
    config = {**pair.config(tokens), "experts": [few, many], "statistic": "min"}
    over = f"at {many} experts over {few}, {tokens} tokens"
    yield Figure(
        f"step {over}",
        ours_x,
        "x",
        config=config,
        n=rounds,
        spread={"ours": spread(seconds[3]), "peer": spread(seconds[4])},
        peer=Peer(pair.peer_name, peer_x),
        target=TARGET,
    )
    yield Figure(
        f"frozen GEMMs alone {over}", frozen_x, "x", config=config, n=rounds, spread={"ours": spread(seconds[5])}
    )


def _frozen_gemms(pair: Pair, inputs: Inputs) -> Callable[[], object]:
    """Return a function with the wide GEMMs of one step: two forward, and two for the gradients of their inputs."""
    experts = pair.experts_of_peer()
    gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
    offs = inputs.topk_TK.flatten().bincount(minlength=pair.shape.experts).cumsum(0).to(torch.int32)
    rows = inputs.topk_TK.numel()
    x, both, h = (
        torch.randn(rows, n) for n in (pair.shape.hidden, 2 * pair.shape.intermediate, pair.shape.intermediate)
    )

    def run() -> object:
        return [
            F.grouped_mm(x, gate_up.transpose(1, 2), offs=offs),
            F.grouped_mm(h, down.transpose(1, 2), offs=offs),
            F.grouped_mm(x, down, offs=offs),
            F.grouped_mm(both, gate_up, offs=offs),
        ]

    return run

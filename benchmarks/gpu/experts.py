"""Time and memory of a step of one expert block of the 30B model with LoRA, compared with PEFT."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.experts.expert_block import Inputs, Pair, Shape
from benchmarks.gpu.device import synchronise
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure, Peer, ratio_at_least
from benchmarks.harness.measure import Side, race
from benchmarks.harness.outputs import same_tensors

RELATIVE = 3e-2
"""Allowed error relative to each tensor's largest value: the sides round to bfloat16 at different places."""


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield time and, on a GPU, memory for each number of tokens."""
    assert sizes.model.experts is not None
    shape = Shape(
        hidden=sizes.model.hidden,
        intermediate=sizes.model.expert_hidden,
        experts=sizes.model.experts,
        top_k=sizes.model.top_k,
        r=16,
    )
    pair = Pair(shape, device=sizes.device, dtype=torch.bfloat16)
    for tokens in sizes.expert_tokens:
        inputs = pair.inputs(tokens)
        raced = race(
            *pair.sides(inputs),
            same=_same,
            rounds=2 * sizes.rounds,
            warmup=3,
            statistic="median",
            synchronise=synchronise,
        )
        yield raced.figure(
            f"step, {tokens} tokens",
            config=pair.config(tokens),
            target=ratio_at_least(1.0) if sizes.name == "full" else None,
        )
        if sizes.device == "cuda":
            ours, peer = (_peak(pair, inputs, side) for side in pair.sides(inputs))
            yield Figure(
                f"memory of a step, {tokens} tokens",
                ours,
                "bytes",
                config=pair.config(tokens),
                peer=Peer(pair.peer_name, peer),
                target=ratio_at_least(1.0),
            )


def _same(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    same_tensors(ours, peer, relative=RELATIVE)


def _peak(pair: Pair, inputs: Inputs, side: Side) -> float:
    """Return the peak bytes of a step above those allocated before it."""
    pair.forget(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs: dict[str, Tensor] = side.run()
    torch.cuda.synchronize()
    del outputs
    return float(torch.cuda.max_memory_allocated() - before)

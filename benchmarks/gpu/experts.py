"""`gpu-experts`: one expert block of the 30B model with LoRA on a GPU, beside PEFT's: time and memory of a step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.expert_block import Inputs, Pair, Shape
from benchmarks.figure import Figure, Target
from benchmarks.measure import Side, race
from benchmarks.outputs import same_tensors

SHAPE = Shape(hidden=2048, intermediate=768, experts=128, r=16)
TOKENS = (1024, 4096, 16384)
RELATIVE = 3e-2
"""Both round to bfloat16 at other places: as a share of each tensor's largest value."""


def run() -> Iterator[Figure]:
    """Yield time and memory at each number of tokens."""
    yield from figures("cuda", SHAPE, TOKENS, rounds=10)


def figures(device: str, shape: Shape, tokens: tuple[int, ...], *, rounds: int) -> Iterator[Figure]:
    """The same on any device; memory is counted where the device counts it."""
    pair = Pair(shape, device=device, dtype=torch.bfloat16)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for count in tokens:
        inputs = pair.inputs(count)
        raced = race(
            *pair.sides(inputs), same=_same, rounds=rounds, warmup=3,
            statistic="median", synchronise=wait,
        )  # fmt: skip
        yield raced.figure(
            metric=f"step, {count} tokens", config=pair.config(count),
            target=Target(of="ratio", rule="at least", floor=1.0),
        )  # fmt: skip
        if device == "cuda":
            ours, peer = (_peak(pair, inputs, side) for side in pair.sides(inputs))
            yield Figure(
                metric=f"memory of a step, {count} tokens", value=ours, unit="bytes", config=pair.config(count),
                peer=pair.peer_name, peer_value=peer, target=Target(of="ratio", rule="at least", floor=1.0),
            )  # fmt: skip


def _same(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    same_tensors(ours, peer, relative=RELATIVE)


def _peak(pair: Pair, inputs: Inputs, side: Side) -> float:
    """What a step takes at its highest beyond what lies there before it."""
    pair.forget(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found: dict[str, Tensor] = side.run()
    torch.cuda.synchronize()
    del found
    return float(torch.cuda.max_memory_allocated() - before)

"""`moe-lora-memory`: bytes that one expert block with LoRA keeps for backward, and its largest allocation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.experts.expert_block import Inputs, Pair, same_step
from benchmarks.experts.moe_lora_step import NARROW, WIDE
from benchmarks.harness.figure import Figure, Peer, at_most, ratio_at_least
from benchmarks.harness.memory import Allocations, Saved

CASES = ((WIDE, 512), (WIDE, 2048), (NARROW, 256), (NARROW, 1024), (NARROW, 4096))
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one step of one side, above those that existed before its forward."""

    saved: int
    alive: int
    peak: int
    largest: int
    largest_by: str


def run() -> Iterator[Figure]:
    """Yield, for each shape, bytes saved, bytes alive after forward, peak, and the largest allocation."""
    torch.set_num_threads(1)
    pair: Pair | None = None
    for shape, tokens in CASES:
        if pair is None or pair.shape != shape:
            pair = Pair(shape)
        yield from _figures(pair, tokens)


def _figures(pair: Pair, tokens: int) -> Iterator[Figure]:
    inputs, shape = pair.inputs(tokens), pair.shape
    ours, peer = pair.sides(inputs)
    same_step(ours.run(), peer.run())
    ours_took, peer_took = (_measure(pair, inputs, forward) for forward in (pair.forward_ours, pair.forward_peer))
    no_more = ratio_at_least(1.0)
    stack = shape.smaller_stack_bytes
    widest = 4 * tokens * shape.top_k * max(shape.hidden, 2 * shape.intermediate + shape.r)
    # in narrow blocks with many tokens, activations exceed a stack and are the bound
    below_a_stack = at_most(max(stack - 1, widest) / MIB, goal=widest / MIB)
    config = pair.config(tokens) | {
        "largest_by": ours_took.largest_by,
        "peer_largest_by": peer_took.largest_by,
        "smaller_expert_stack_mib": stack / MIB,
    }
    for metric, value, peer_value, target in (
        ("saved for backward", ours_took.saved, peer_took.saved, no_more),
        ("alive after forward", ours_took.alive, peer_took.alive, no_more),
        ("peak of the step", ours_took.peak, peer_took.peak, None),
        ("largest allocation", ours_took.largest, peer_took.largest, below_a_stack),
    ):
        yield Figure(
            f"{metric}, D={shape.hidden}, {tokens} tokens",
            value / MIB,
            "MiB",
            config=config,
            peer=Peer(pair.peer_name, peer_value / MIB),
            target=target,
        )


def _measure(pair: Pair, inputs: Inputs, forward: Callable[[Inputs], Tensor]) -> Memory:
    pair.forget(inputs)
    weights = [*pair.experts.buffers(), *pair.experts.parameters(), *pair.peer.parameters()]
    with Allocations() as allocations:
        with Saved(beside=[*inputs.leaves(), *weights]) as saved:
            y_TD = forward(inputs)
        saved_bytes, live_bytes = saved.bytes, allocations.live_bytes
        torch.autograd.backward(y_TD, inputs.grad_TD)
    pair.forget(inputs)
    return Memory(
        saved=saved_bytes,
        alive=live_bytes,
        peak=allocations.peak_bytes,
        largest=allocations.largest_bytes,
        largest_by=allocations.largest_by,
    )

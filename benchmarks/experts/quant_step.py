"""`quant-step`: an expert block with LoRA beside quantised experts, forward and backward, compared with plain ones."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.experts.expert_block import Inputs, Pair, Shape, same_step
from benchmarks.harness.figure import Figure, ratio_at_least
from benchmarks.harness.measure import Side, race
from moe.experts import GroupedExperts
from moe.kernels.packed import Bits

SHAPE = Shape(hidden=1024, intermediate=384, experts=64)
TOKENS = 2048
FORMS: tuple[Bits, ...] = ("int8", "nf4")


def run() -> Iterator[Figure]:
    """Yield a figure per form. Both sides compute with the same values, so their gradients are equal."""
    torch.set_num_threads(1)  # more threads would compete with other processes on a small machine
    for bits in FORMS:
        pair = Pair(SHAPE, dtype=torch.bfloat16)
        plain, packed = pair.experts, _packed(pair.experts, bits)
        inputs = pair.inputs(TOKENS)
        sides = [
            Side(name=name, run=partial(_step, pair, experts, inputs))
            for name, experts in ((bits, packed), ("bfloat16", plain))
        ]
        raced = race(*sides, same=same_step, rounds=5)
        target = ratio_at_least(0.5, goal=0.8)
        yield raced.figure(f"step beside {bits}, {TOKENS} tokens", config=pair.config(TOKENS), target=target)


def _step(pair: Pair, experts: GroupedExperts, inputs: Inputs) -> dict[str, torch.Tensor]:
    pair.experts = experts
    made: dict[str, torch.Tensor] = pair.sides(inputs)[0].run()
    return made


@torch.no_grad()
def _packed(plain: GroupedExperts, bits: Bits) -> GroupedExperts:
    """Return the same experts in `bits`, and give the plain ones the values that these stand for."""
    packed = GroupedExperts(
        name="block",
        num_experts=plain.num_experts,
        local_experts=plain.local_experts,
        hidden=plain.hidden,
        intermediate=plain.intermediate,
        mode="lora",
        lora=plain.lora,
        resident=True,
        seed=0,
        dtype=torch.bfloat16,
        bits=bits,
    )
    for key, packing in packed.packings.items():
        getattr(packed, key).copy_(packing.pack(getattr(plain, key), name=key))
        packing.unpack(getattr(packed, key), getattr(plain, key))
    packed.load_state_dict(
        {name: factor for name, factor in plain.state_dict().items() if "lora" in name}, strict=False
    )
    return packed

"""Who reads and keeps what when a base is loaded: arithmetic over shapes, for any number of ranks. Loads no torch.

`finetune.weights` does what this says; a test compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from finetune.layouts import is_expert_stack
from finetune.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Bytes that one rank reads from the base's files, keeps, and at most holds at once beside what it keeps."""

    rank: int
    read: int
    held: int
    largest: int


def rank_shares(
    shapes: Mapping[str, Shape], *, world_size: int, ep_size: int, itemsize: int, resident: bool
) -> list[RankShare]:
    """Every rank's share of a frozen base, by the rule of `finetune.weights`.

    Dense tensors are read by rank 0; an expert stack's rows by the first rank that holds them. A resident weight is
    kept whole by every rank that uses it; otherwise ZeRO-3 cuts dense tensors over all ranks and expert rows over the
    world_size / ep_size ranks that hold the same experts, each slice rounded up to whole elements.
    """
    dense = [prod(shape) for name, shape in shapes.items() if not is_expert_stack(name)]
    stacks = [prod(shape) // ep_size for name, shape in shapes.items() if is_expert_stack(name)]
    held = sum(dense) + sum(stacks)
    if not resident:
        replicas = world_size // ep_size
        held = sum(-(-size // world_size) for size in dense) + sum(-(-size // replicas) for size in stacks)
    return [
        RankShare(
            rank=rank,
            read=itemsize * ((sum(dense) if rank == 0 else 0) + (sum(stacks) if rank < ep_size else 0)),
            held=itemsize * held,
            largest=itemsize * max([*dense, *stacks]),
        )
        for rank in range(world_size)
    ]

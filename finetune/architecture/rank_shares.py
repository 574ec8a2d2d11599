"""What each rank reads and keeps when a base is loaded: arithmetic over shapes. Loads no torch.

`finetune.model.weights` does what this says; a test compares the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from finetune.architecture.shapes import Shape, is_expert_stack


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Bytes that one rank reads, keeps, and holds temporarily at its peak while loading."""

    rank: int
    read: int
    kept: int
    largest: int


def rank_shares(
    shapes: Mapping[str, Shape], *, world_size: int, ep_size: int, itemsize: int, resident: bool
) -> list[RankShare]:
    """Return every rank's share of a frozen base, by the rule of `finetune.model.weights`.

    Dense tensors are read by rank 0; an expert stack's rows by the first rank that holds them. A resident weight is
    kept whole by every rank that uses it; otherwise ZeRO-3 cuts dense tensors over all ranks and expert rows over the
    world_size / ep_size ranks that hold the same experts, each slice rounded up to whole elements.
    """
    dense = [prod(shape) for name, shape in shapes.items() if not is_expert_stack(name)]
    stacks = [prod(shape) // ep_size for name, shape in shapes.items() if is_expert_stack(name)]
    kept = sum(dense) + sum(stacks)
    if not resident:
        replicas = world_size // ep_size
        kept = sum(-(-size // world_size) for size in dense) + sum(-(-size // replicas) for size in stacks)
    return [
        RankShare(
            rank=rank,
            read=itemsize * ((sum(dense) if rank == 0 else 0) + (sum(stacks) if rank < ep_size else 0)),
            kept=itemsize * kept,
            largest=itemsize * max([*dense, *stacks]),
        )
        for rank in range(world_size)
    ]


LEAST_MARGIN = 0.05
"""Share of a device's memory that must stay free beyond all that is foreseen, the allocator's reserve included.
A peak is foreseen within 10 %, not counting the weights; and a run must not end at its fullest row."""


@dataclass(frozen=True, kw_only=True)
class ResidentChoice:
    """Whether frozen weights stay whole on each rank, and why; the reason is printed at start."""

    resident: bool
    reason: str


def has_room(*, needed_bytes: int, room_bytes: int) -> bool:
    """Say whether a device has room for this many bytes."""
    return room_bytes - needed_bytes >= LEAST_MARGIN * room_bytes


def choose_resident(
    choice: Literal["auto", "frozen", "none"], *, needed_bytes: Callable[[], int], room_bytes: int
) -> ResidentChoice:
    """Decide `parallel.resident` from what a rank needs in all when they stay whole, and the memory it has."""
    if choice == "auto":
        needed = needed_bytes()
        sizes = f"with whole frozen weights a rank needs {needed / 1e9:.1f} GB of {room_bytes / 1e9:.1f}"
        return ResidentChoice(
            resident=has_room(needed_bytes=needed, room_bytes=room_bytes),
            reason=f"auto: {sizes}, {LEAST_MARGIN:.0%} of which stay free",
        )
    if choice not in ("frozen", "none"):
        raise ValueError(f"parallel.resident: {choice!r} is not one of auto, frozen, none")
    return ResidentChoice(resident=choice == "frozen", reason=f"parallel.resident: {choice}")

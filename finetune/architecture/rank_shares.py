"""The bytes that each rank reads and keeps when a base is loaded, computed from shapes. Loads no torch.

`finetune.model.weights` loads by the same rule; a test compares the two.
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

    Rank 0 reads dense tensors; the first rank that holds rows of an expert stack reads those. Every rank that uses a
    resident weight keeps all of it; otherwise ZeRO-3 cuts dense tensors over all ranks and expert rows over the
    world_size / ep_size ranks that hold the same experts, with each slice rounded up to whole elements.
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
"""Share of a device's memory that must stay free in addition to the predicted use and the allocator's reserve.
The predicted peak is exact within 10 %, not counting the weights, and a run must not fail at its fullest row."""


@dataclass(frozen=True, kw_only=True)
class ResidentChoice:
    """The choice to keep complete frozen weights on each rank, with its reason, which is printed at the start."""

    resident: bool
    reason: str


def has_room(*, needed_bytes: int, room_bytes: int) -> bool:
    """Return whether a device has room for this many bytes."""
    return room_bytes - needed_bytes >= LEAST_MARGIN * room_bytes


def choose_resident(
    choice: Literal["auto", "frozen", "none"], *, needed_bytes: Callable[[], int], room_bytes: int
) -> ResidentChoice:
    """Decide `parallel.resident` from the memory that a rank needs with resident weights and the memory it has."""
    if choice == "auto":
        needed = needed_bytes()
        sizes = f"with resident frozen weights a rank needs {needed / 1e9:.1f} GB of {room_bytes / 1e9:.1f} GB"
        return ResidentChoice(
            resident=has_room(needed_bytes=needed, room_bytes=room_bytes),
            reason=f"auto: {sizes}, of which {LEAST_MARGIN:.0%} must stay free",
        )
    if choice not in ("frozen", "none"):
        raise ValueError(f"parallel.resident must be one of auto, frozen, none, got {choice!r}")
    return ResidentChoice(resident=choice == "frozen", reason=f"parallel.resident: {choice}")

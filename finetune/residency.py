"""Whether a rank has room, and whether frozen weights stay whole on it: one rule for all who ask. Loads no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LEAST_MARGIN = 0.05
"""Of a device's memory: what stays free beyond all that is foreseen, its reserve for the allocator included.
A peak is foreseen within 10 %, but for the weights; and a run shall not end at its fullest row."""


@dataclass(frozen=True, kw_only=True)
class ResidentChoice:
    """Whether frozen weights stay whole on each rank, and why; the reason is printed at start."""

    resident: bool
    reason: str


def has_room(*, needed_bytes: int, room_bytes: int) -> bool:
    """Say whether so much may be asked of a device's memory."""
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

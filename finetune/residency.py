"""Whether frozen weights stay whole on each rank, by bytes alone. Loads no torch."""

from dataclasses import dataclass
from typing import Literal

ROOM_SHARE = 0.6
"""`auto` keeps frozen weights resident when they take at most this share of a rank's memory."""


@dataclass(frozen=True, kw_only=True)
class ResidentChoice:
    """Whether frozen weights stay whole on each rank, and why; the reason is printed at start."""

    resident: bool
    reason: str


def choose_resident(choice: Literal["auto", "frozen", "none"], *, frozen_bytes: int, room_bytes: int) -> ResidentChoice:
    """Decide `parallel.resident` from the frozen bytes a rank would hold and the memory it has."""
    if choice == "auto":
        fits = frozen_bytes <= ROOM_SHARE * room_bytes
        sizes = f"{frozen_bytes / 1e9:.1f} GB of frozen weights a rank, {room_bytes / 1e9:.1f} GB of memory"
        return ResidentChoice(resident=fits, reason=f"auto: {sizes}, limit {ROOM_SHARE:.0%}")
    if choice not in ("frozen", "none"):
        raise ValueError(f"parallel.resident: {choice!r} is not one of auto, frozen, none")
    return ResidentChoice(resident=choice == "frozen", reason=f"parallel.resident: {choice}")

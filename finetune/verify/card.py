"""One line of the card of a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "note", "skip"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the card. A note only informs; a skipped check was switched off, or needs one that failed."""

    name: str
    status: Status
    detail: str

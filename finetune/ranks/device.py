"""The device that a user named for one process, or one clear error."""

from __future__ import annotations

import re

import torch


def open_device(name: str) -> torch.device:
    """Return the device and make it the current one."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device is {name!r}; allowed are cpu, cuda, or one GPU by its number, as cuda:1")
    place = torch.device(name)
    if place.type == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= seen:
            raise ValueError(f"--device is {name}, but torch sees {seen} GPUs here; use --device cpu or a lower number")
        torch.cuda.set_device(place)
    return place

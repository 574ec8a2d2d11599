"""The device of one process, and the memory that a rank has for itself."""

from __future__ import annotations

import os
import re

import torch

from data.format.printable import count_of


def open_device(name: str) -> torch.device:
    """Return the device and make it the current one."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device is {name!r}; use cpu, cuda, or one GPU by its number, such as cuda:1")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device is {name}, but torch sees {count_of(count, 'GPU')} here; use --device cpu or a lower number"
            )
        torch.cuda.set_device(device)
    return device


def room() -> tuple[int, bool]:
    """Return the bytes of memory that one rank has for itself, and whether it is that of a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, True
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_here, False

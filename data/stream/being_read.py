"""Which sample each worker is reading, in shared memory: readable while a worker hangs."""

import torch
from torch.utils.data import get_worker_info

WIDTH = 512
"""Bytes of a sample's name that are kept."""


class Reading:
    """One line for the process itself and one for each worker; it travels into the workers with the reader."""

    def __init__(self, workers: int) -> None:
        self._lines = torch.zeros(workers + 1, WIDTH, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]  # torch's stub

    def note(self, name: str) -> None:
        """Say what is being read here; nothing when it is done."""
        worker = get_worker_info()
        line = name.encode()[:WIDTH].ljust(WIDTH, b"\0")
        self._lines[0 if worker is None else worker.id + 1] = torch.frombuffer(bytearray(line), dtype=torch.uint8)

    def now(self) -> list[str]:
        """Return what is being read, and by which worker."""
        names = [bytes(line.tolist()).rstrip(b"\0").decode(errors="replace") for line in self._lines]
        return [f"{name} (worker {at - 1})" if at else name for at, name in enumerate(names) if name]

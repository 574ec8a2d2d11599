"""The sample that each worker is reading, kept in shared memory so that it can be read while the worker hangs."""

import torch
from torch.utils.data import get_worker_info

WIDTH = 512
"""Bytes kept of a sample's name."""


class Reading:
    """One line for the process itself and one for each worker. It is sent to the workers with the reader."""

    def __init__(self, workers: int) -> None:
        self._lines = torch.zeros(workers + 1, WIDTH, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]  # torch's stub

    def note(self, name: str) -> None:
        """Record the sample that this process reads; an empty name means none."""
        worker = get_worker_info()
        line = name.encode()[:WIDTH].ljust(WIDTH, b"\0")
        self._lines[0 if worker is None else worker.id + 1] = torch.frombuffer(bytearray(line), dtype=torch.uint8)

    def now(self) -> list[str]:
        """Return the samples that are being read, each with its worker."""
        names = [bytes(line.tolist()).rstrip(b"\0").decode(errors="replace") for line in self._lines]
        return [f"{name} (worker {at - 1})" if at else name for at, name in enumerate(names) if name]

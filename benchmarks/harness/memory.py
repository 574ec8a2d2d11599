"""Measure memory: autograd's saved tensors and allocations exactly, a process's anonymous pages by sampling.

`Saved` and `Allocations` count each storage once, however many tensors share it. Neither sees memory that a kernel
allocates and frees within one operation; `AnonymousPeak` does, to the accuracy of its sampling.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Saved:
    """Counts the bytes that operations in the block keep for backward, except tensors that exist anyway.

    Tensors that an autograd function stores on its context without save_for_backward are not counted here:
    `Allocations.live_bytes` after the forward is the check for those.
    """

    def __init__(self, *, beside: Iterable[Tensor]) -> None:
        self._beside = {_reference(tensor).cdata for tensor in beside}
        self._kept: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes that were kept and are still alive."""
        return sum(size for reference, size in self._kept.values() if not _gone(reference))

    def _pack(self, tensor: Tensor) -> Tensor:
        reference = _reference(tensor)
        if reference.cdata not in self._beside:
            self._kept[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        return tensor.detach()  # a result that kept itself and its graph would never be freed

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the storages that operations in the block allocate: the largest, those alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.largest_bytes = 0
        self.largest_by = "nothing"
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # an upper bound of the live bytes: what was alive at the last count, plus what came since

    @property
    def live_bytes(self) -> int:
        """Bytes allocated in the block that are still alive."""
        self._alive = {key: pair for key, pair in self._alive.items() if not _gone(pair[0])}
        self._at_most = sum(size for _, size in self._alive.values())
        return self._at_most

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count the storages of its results that no argument shares."""
        given = {_reference(tensor).cdata for tensor in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            reference, size = _reference(tensor), tensor.untyped_storage().nbytes()
            if reference.cdata in given or reference.cdata in self._alive:
                continue
            self._alive[reference.cdata] = (reference, size)
            self._at_most += size
            if size > self.largest_bytes:
                self.largest_bytes, self.largest_by = size, f"{func} -> {tuple(tensor.shape)}"
        if self._at_most > self.peak_bytes:  # otherwise there cannot be a new peak
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result


class AnonymousPeak:
    """Samples a process's anonymous resident memory (RssAnon, Linux) during the block; file pages do not count."""

    def __init__(self, *, pid: int | None = None, interval_s: float = 0.002) -> None:
        self._status = Path(f"/proc/{pid or os.getpid()}/status")
        self._interval_s, self._stop = interval_s, threading.Event()
        self.start_bytes = self.end_bytes = self.highest_bytes = 0

    @property
    def peak_bytes(self) -> int:
        """The highest sample, relative to the start of the block."""
        return self.highest_bytes - self.start_bytes

    def __enter__(self) -> Self:
        self.start_bytes = self.highest_bytes = self._sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.end_bytes = self._sample()
        self.highest_bytes = max(self.highest_bytes, self.end_bytes)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.highest_bytes = max(self.highest_bytes, self._sample())

    def _sample(self) -> int:
        line = next(line for line in self._status.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024


def _reference(tensor: Tensor) -> StorageWeakRef:
    """Return a weak reference, which reserves the address for this storage without keeping its bytes alive."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

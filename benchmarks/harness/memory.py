"""Memory counted exactly: what autograd keeps, what operations allocate; and sampled: a process's anonymous pages.

`Saved` and `Allocations` count storages, each once, however many tensors look at it. Neither sees memory that a kernel
takes and gives back inside one operation; `AnonymousPeak` does, at the accuracy of its sampling.
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
    """Counts what the operations inside the block keep for backward, beside the tensors that exist anyway.

    What an autograd function hides on its context, past save_for_backward, is not seen here: `Allocations.live_bytes`
    after the forward is the check on that.
    """

    def __init__(self, *, beside: Iterable[Tensor]) -> None:
        self._beside = {_reference(tensor).cdata for tensor in beside}
        self._kept: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes kept and still alive."""
        return sum(size for reference, size in self._kept.values() if not _gone(reference))

    def _pack(self, tensor: Tensor) -> Tensor:
        reference = _reference(tensor)
        if reference.cdata not in self._beside:
            self._kept[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        return tensor.detach()  # a result that kept itself, with its graph, would never be freed

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the storages that operations inside the block make: the largest, those alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.largest_bytes = 0
        self.largest_by = "nothing"
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # what is alive, and what was when it was last looked through

    @property
    def live_bytes(self) -> int:
        """Bytes made inside the block that are still alive."""
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
        """Run the operation and count the storages of its results that none of its arguments had."""
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
        if self._at_most > self.peak_bytes:  # else nothing new can be the highest
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result


class AnonymousPeak:
    """Samples a process's anonymous resident memory (RssAnon, Linux) while the block runs; files do not count."""

    def __init__(self, *, pid: int | None = None, interval_s: float = 0.002) -> None:
        self._status = Path(f"/proc/{pid or os.getpid()}/status")
        self._interval_s, self._stop = interval_s, threading.Event()
        self.start_bytes = self.end_bytes = self.highest_bytes = 0

    @property
    def peak_bytes(self) -> int:
        """The highest sample, above what was there when the block began."""
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
    """Return a weak reference: it keeps the address from being taken by another storage, not the bytes alive."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

"""What a recomputed decoder layer keeps from its first pass, so that the second pass cannot differ and need not talk.

Activation checkpointing runs a layer twice. Whatever the layer wraps in `kept(name, compute)` is computed in the first
pass and handed back in the second, when the mode lists `name` below. The mechanism is explicit on purpose: a
dispatch-mode policy costs host time on *every* operation of the layer, and sees a collective's buffer rather than its
meaning.

Everything else is computed again: in `layer` the whole decoder layer except the router's choice; in `selective` norms,
attention, dense projections, permutations, SwiGLU and the thin LoRA GEMMs, but neither the all-to-alls (4 payload units
a layer instead of 6) nor the wide expert GEMMs.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from moe.host import HostCopy, to_host, worth_moving

T = TypeVar("T")
Recompute = Literal["none", "layer", "selective"]

KEPT: dict[str, frozenset[str]] = {
    # the choice of experts and how many rows go where: a second pass with other rounding could route differently
    "layer": frozenset({"topk", "counts"}),
    # and every row that crossed ranks, and the wide GEMM in front of SwiGLU
    "selective": frozenset({"topk", "counts", "dispatched", "gate_up", "combined"}),
}
UNREAD: dict[str, frozenset[str]] = {
    "layer": frozenset(),
    # the experts' output only feeds `combined`, which is kept: the second pass needs its shape, never its values
    "selective": frozenset({"down"}),
}

_current = threading.local()


def contexts(
    mode: Recompute, *, host_from_bytes: int | None = None
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the `context_fn` of torch's non-reentrant checkpoint for `layer` or `selective`.

    What is kept and has at least `host_from_bytes` waits in host memory; None: nothing does.
    """
    names, unread = KEPT[mode], UNREAD[mode]

    def context_fn() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        store: dict[str, deque[Any]] = {}
        return (
            _Pass(names, unread, store, again=False, host_from_bytes=host_from_bytes),
            _Pass(names, unread, store, again=True),
        )

    return context_fn


def kept(name: str, compute: Callable[[], T]) -> T:
    """Return compute(), or in the second pass the first pass's result when the mode keeps `name`.

    The result comes back without its graph: the second pass only refills what the first pass's graph saved. So
    `compute` must not save tensors for backward itself; a functional collective, and anything without gradient, do not.
    """
    here = getattr(_current, "value", None)
    if here is None or name not in here.names:
        return compute()
    value: T = here.again_value(name) if here.again else here.first_value(name, compute())
    return value


def unread(name: str, compute: Callable[[], Tensor], shape_of: Callable[[], Tensor]) -> Tensor:
    """Return compute(), or in the second pass `shape_of()` (uninitialised) where the mode says nobody reads `name`."""
    here = getattr(_current, "value", None)
    return shape_of() if here is not None and here.again and name in here.unread else compute()


class _Pass(AbstractContextManager[None]):
    """One pass over a checkpointed region; both passes share the store, which dies with the region's graph."""

    def __init__(
        self, names: frozenset[str], unread: frozenset[str], store: dict[str, deque[Any]], *, again: bool,
        host_from_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.host_from_bytes = host_from_bytes
        self.names, self.unread, self.store, self.again = names, unread, store, again
        self.outer: _Pass | None = None

    def first_value(self, name: str, value: T) -> T:
        is_tensor = isinstance(value, Tensor)
        entry = (self._held(value.detach()), value.requires_grad) if isinstance(value, Tensor) else (value, None)
        self.store.setdefault(name, deque()).append((is_tensor, entry))
        return value

    def _held(self, value: Tensor) -> Tensor | HostCopy:
        moves = self.host_from_bytes is not None and worth_moving(value, self.host_from_bytes)
        return to_host(value) if moves else value

    def again_value(self, name: str) -> Any:
        assert self.store.get(name), f"the second pass asks for {name!r} more often than the first pass made it"
        is_tensor, (value, requires_grad) = self.store[name].popleft()
        value = value.back() if isinstance(value, HostCopy) else value
        # a tensor that took part in the graph must do so again, or other operations would save other tensors
        return value.requires_grad_(requires_grad) if is_tensor and requires_grad and torch.is_grad_enabled() else value

    def __enter__(self) -> None:
        self.outer = getattr(_current, "value", None)
        _current.value = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.value = self.outer

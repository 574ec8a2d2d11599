"""Recomputes decoder layers, keeping the results that a second pass must not change or need not communicate again.

Activation checkpointing runs a layer twice. A result that the layer wraps in `kept(name, compute)` is computed in the
first pass and returned again in the second, if the mode lists `name` below. The mechanism is explicit on purpose: a
dispatch-mode policy costs host time on *every* operation of the layer, and sees a collective's buffer rather than its
meaning.

Everything else is computed again: in `layer` the entire decoder layer except the router's choice; in `selective` norms,
attention, dense projections, permutations, SwiGLU and the thin LoRA GEMMs, but neither the all-to-alls (4 payload units
per layer instead of 6) nor the wide expert GEMMs.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from moe.host import HostCopy, to_host, worth_moving

T = TypeVar("T")
Recompute = Literal["none", "layer", "selective"]
ContextFn = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]

KEPT: dict[str, frozenset[str]] = {
    # the choice of experts and the numbers of rows: a second pass that rounds differently could route differently
    "layer": frozenset({"topk", "counts"}),
    # also every row that crossed ranks, and the output of the wide GEMM before SwiGLU
    "selective": frozenset({"topk", "counts", "dispatched", "gate_up", "combined"}),
}
UNREAD: dict[str, frozenset[str]] = {
    "layer": frozenset(),
    # the experts' output feeds only `combined`, which is kept: the second pass needs its shape, never its values
    "selective": frozenset({"down"}),
}

_current = threading.local()


def contexts(mode: Recompute, *, host_from_bytes: int | None = None) -> ContextFn:
    """Return the `context_fn` of torch's non-reentrant checkpoint for `layer` or `selective`.

    Kept tensors of at least `host_from_bytes` wait in host memory; with None, none do.
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
    """Return compute(), or in the second pass the first pass's result if the mode keeps `name`.

    The result comes back without its graph: the second pass only restores the tensors that the first pass's graph
    saved. So `compute` must not save tensors for backward itself; functional collectives and anything without gradient
    do not.
    """
    here = getattr(_current, "value", None)
    if here is None or name not in here.names:
        return compute()
    value: T = here.again_value(name) if here.again else here.first_value(name, compute())
    return value


def unread(name: str, compute: Callable[[], Tensor], shape_of: Callable[[], Tensor]) -> Tensor:
    """Return compute(), or in the second pass `shape_of()` (uninitialised) if the mode does not read `name` there."""
    here = getattr(_current, "value", None)
    return shape_of() if here is not None and here.again and name in here.unread else compute()


def checkpointed(run: Callable[..., T], *inputs: Any, context_fn: ContextFn, draws: bool) -> T:
    """Return run(*inputs) and let backward compute again what it needs; `draws`: it uses torch's own random numbers.

    This does the same as torch's non-reentrant checkpoint, for one backward per forward and without autocasting.
    torch's handles more cases, at a cost in host time for each tensor that an operation saves.
    """
    first, second = context_fn()
    region = _Region(run, inputs, second, draws=draws)
    with saved_tensors_hooks(region.save, region.find), first:
        return run(*inputs)


class _EnoughError(Exception):
    """Ends the second pass once all tensors that the first one saved are restored."""


class _Inputs(torch.autograd.Function):
    """A node that only saves tensors, through the hooks around the region, which may move them to host memory."""

    @staticmethod
    def forward(ctx: Any, here: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return here.view_as(here)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise AssertionError("nothing depends on this node")


class _Region:
    """The code that runs twice. The graph of the first pass holds, for each saved tensor, its index in the second."""

    def __init__(
        self, run: Callable[..., Any], inputs: Sequence[Any], second: AbstractContextManager[None], *, draws: bool
    ) -> None:
        self.run, self.second = run, second
        self.inputs = [None if isinstance(each, Tensor) else each for each in inputs]
        self.places = [place for place, each in enumerate(inputs) if isinstance(each, Tensor)]
        tensors = (inputs[place] for place in self.places)
        # the output is kept as well: in torch 2.11 a node frees its saved tensors when its output is freed
        self.saver: Any = _Inputs.apply(torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]
        self.random = (torch.get_rng_state(), *get_device_states(*inputs)) if draws else None
        self.saved: list[tuple[torch.Size, torch.dtype]] = []
        self.found: list[Tensor | None] | None = None

    def save(self, tensor: Tensor) -> int:
        """Note the shape and dtype of a tensor that the first pass saves, without keeping the tensor."""
        self.saved.append((tensor.shape, tensor.dtype))
        return len(self.saved) - 1

    def find(self, place: int) -> Tensor:
        """Return the saved tensor at `place`; the first call computes all of them again."""
        if self.found is None:
            self.found = []
            with suppress(_EnoughError):
                self._run_again(self.found)
            assert len(self.found) == len(self.saved), "the second pass saves fewer tensors than the first"
        tensor, self.found[place] = self.found[place], None
        assert tensor is not None, "a saved tensor can be used by one backward only"
        return tensor

    def _run_again(self, found: list[Tensor | None]) -> None:
        def keep(tensor: Tensor) -> None:
            assert (tensor.shape, tensor.dtype) == self.saved[len(found)], "the second pass differs from the first"
            found.append(tensor.detach() if tensor.requires_grad else tensor)
            if len(found) == len(self.saved):
                raise _EnoughError

        inputs = list(self.inputs)
        for place, tensor in zip(self.places, self.saver.grad_fn.saved_tensors, strict=True):
            inputs[place] = tensor
        state, devices, states = self.random or (None, [], [])
        kind = next(
            (each.device.type for each in inputs if isinstance(each, Tensor) and each.device.type != "cpu"), "cuda"
        )
        with torch.random.fork_rng(devices, enabled=state is not None, device_type=kind):
            if state is not None:
                torch.set_rng_state(state)
                set_device_states(devices, states, device_type=kind)
            with saved_tensors_hooks(keep, _not_asked_for), torch.enable_grad(), self.second:
                self.run(*inputs)


def _not_asked_for(_: None) -> Tensor:
    raise AssertionError("no backward may run inside a recomputed region")


class _Pass(AbstractContextManager[None]):
    """One pass over a checkpointed region; both passes share the store, which dies with the region's graph."""

    def __init__(
        self,
        names: frozenset[str],
        unread: frozenset[str],
        store: dict[str, deque[Any]],
        *,
        again: bool,
        host_from_bytes: int | None = None,
    ) -> None:
        self.host_from_bytes = host_from_bytes
        self.names = names
        self.unread = unread
        self.store = store
        self.again = again
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
        # a tensor that was part of the graph must be so again, or operations would save different tensors
        return value.requires_grad_(requires_grad) if is_tensor and requires_grad and torch.is_grad_enabled() else value

    def __enter__(self) -> None:
        self.outer = getattr(_current, "value", None)
        _current.value = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.value = self.outer

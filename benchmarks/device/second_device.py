"""Simulate a second device: its tensors report the device `second`, keep their values on the CPU, and do not mix.

Every operation computes on the CPU, so that control flow is the same as in a real run. Operations that CUDA refuses are
refused here (`cuda_rules`). Operations that would make the host wait for a real device are counted by their place in
the code. A copy to the device waits too, unless it is non-blocking and comes from page-locked memory.

Importing this module names torch's spare device for the rest of the process, so use a separate process.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from benchmarks.device import cuda_rules, varlen_by_hand
from benchmarks.device.cuda_rules import Refused
from moe.experts import GroupedExperts

NAME = "second"
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


class _Backend:
    """The functions that torch requires of a device's module, for a single device."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    device = staticmethod(lambda index: nullcontext())
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_rng_state = staticmethod(lambda device=None: torch.zeros(16, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=None: None)


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class Elsewhere(Tensor):
    """A tensor on the second device; `here` has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Self:  # noqa: D102  # a constructor
        assert here.device.type == "cpu"
        assert not isinstance(here, Elsewhere)
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.here = here
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's takes contents, which are not shown
        return f"Elsewhere({list(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Count a wait, because torch reads the memory without an operation."""
        _waits(self, "tolist")
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its methods untyped
    """A context in which tensors can be created on `DEVICE`; `waits` counts the host's waits by place."""

    now: "SecondDevice | None" = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        self.convolutions = 0
        self.pinned: list[Tensor] = []  # kept alive: another tensor at a freed address would seem page-locked

    def __enter__(self) -> Self:
        SecondDevice.now = self
        torch._C._set_only_lift_cpu_tensors(True)  # makes torch.tensor(..., device=...) a copy, which is counted
        self._generator = torch.Generator
        torch.Generator = lambda device="cpu": self._generator("cpu")  # type: ignore[misc, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.Generator = self._generator  # type: ignore[misc]
        torch._C._set_only_lift_cpu_tensors(False)
        SecondDevice.now = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            self.pinned.append(func(*args, **{**kwargs, "pin_memory": False}))
            return self.pinned[-1]
        if _is_second(kwargs.get("device")) or any(isinstance(t, Elsewhere) for t in tree_flatten((args, kwargs))[0]):
            return _compute(func, args, kwargs)
        return func(*args, **kwargs)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory was allocated as page-locked."""
        return any(tensor.untyped_storage().data_ptr() == pinned.untyped_storage().data_ptr() for pinned in self.pinned)


def move_module(module: nn.Module) -> None:
    """Move a module's parameters and buffers to the device, in place; tied ones stay tied."""
    moved: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            made: Tensor = Elsewhere(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            moved[id(tensor)] = made
        return moved[id(tensor)]

    for owner in module.modules():
        tables: list[Any] = [owner._parameters, owner._buffers]
        for table in tables:
            table.update({name: there(tensor) for name, tensor in table.items() if tensor is not None})
    for owner in module.modules():
        if isinstance(owner, GroupedExperts):
            owner.make_room()


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    on_device = [t for t in flat if isinstance(t, Elsewhere)]
    goes_there = _is_second(kwargs["device"]) if kwargs.get("device") is not None else bool(on_device)
    if func in cuda_rules.COPIES:
        goes_there = goes_there if kwargs.get("device") is not None else isinstance(args[0], Elsewhere)
        _count_copy(func, args, kwargs, goes_there=goes_there)
    else:
        _refuse_mixed(func, args, flat)
        if on_device and cuda_rules.waits_for_values(func, args, kwargs):
            _waits(on_device[0], str(func))
    here = [t.here if isinstance(t, Elsewhere) else t for t in flat]
    here = [torch.device("cpu") if isinstance(t, torch.device) and t.type == NAME else t for t in here]
    here_args, here_kwargs = tree_unflatten(here, spec)
    if func is cuda_rules.GROUPED:
        cuda_rules.require_grouped(here_args[0], here_args[1], here_kwargs.get("offs"))
    if func in cuda_rules.CONVOLUTIONS and SecondDevice.now is not None:
        SecondDevice.now.convolutions += 1
    made = _COMPUTED.get(str(func).rpartition(".")[0], func)(*here_args, **here_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not goes_there:
        return made
    known = {id(values): tensor for tensor, values in zip(flat, here, strict=True) if isinstance(tensor, Elsewhere)}
    return tree_map(lambda t: _there(t, known) if isinstance(t, Tensor) else t, made)


def _there(made: Tensor, known: Mapping[int, Tensor]) -> Tensor:
    """Return the device's tensor for these values: the argument itself if the operation changed it in place."""
    return known[id(made)] if id(made) in known else Elsewhere(made)


def _refuse_mixed(func: Any, args: Any, flat: list[Any]) -> None:
    """Raise if tensors of host and device mix, except for scalars and for indices, which are copied."""
    tensors = [t for t in flat if isinstance(t, Tensor)]
    strangers = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    if func in cuda_rules.INDEXED and isinstance(args[0], Elsewhere):
        indices = [t for t in args[1] if t is not None and not isinstance(t, Elsewhere)]
        for index in indices:
            _waits(index, "copy of an index to the device")
        strangers = [t for t in strangers if not any(t is index for index in indices)]
    if strangers and len(strangers) < len(tensors):
        raise Refused(f"{func}: {[list(t.shape) for t in strangers]} are on the CPU, not on {NAME}, at {_place()}")


def _count_copy(func: Any, args: Any, kwargs: dict[str, Any], *, goes_there: bool) -> None:
    makes_new = func is aten._to_copy.default
    source = args[0] if makes_new else args[1]
    if goes_there == isinstance(source, Elsewhere):
        return
    on_host = source if goes_there else None if makes_new else args[0]
    at_once = kwargs.get("non_blocking") or (not makes_new and len(args) > 2 and args[2])
    assert SecondDevice.now is not None
    if on_host is None or not at_once or not SecondDevice.now.is_pinned(on_host):
        _waits(source, f"copy {'to' if goes_there else 'from'} the device")


def _waits(tensor: Tensor, what: str) -> None:
    assert SecondDevice.now is not None
    if tensor.numel():
        SecondDevice.now.waits[f"{what} @ {_place()}"] += 1


def _place() -> str:
    """Return the nearest line of our code, and the nearest line of transformers or PEFT below it."""
    places: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        library = next((part for part in ("transformers", "peft") if f"/{part}/" in str(file)), "")
        ours = file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in ("data", "moe", "finetune")
        if ours or (library and not places):
            places.append(f"{file.parent.name}/{file.name}:{frame.f_lineno} {frame.f_code.co_name}")
        if ours:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(places) or "backward"


def _is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


_COMPUTED = {
    "torch_attn._varlen_attn": varlen_by_hand.forward,
    "torch_attn._varlen_attn_backward": varlen_by_hand.backward,
    "aten.histc": lambda x, *bins: aten.histc(x.float(), *bins).to(x.dtype),  # the CPU has none for integers
}

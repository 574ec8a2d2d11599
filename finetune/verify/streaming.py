"""Runs a model that is larger than memory: each layer's weights are read when the layer is called, then dropped.

The model itself stays on meta; it runs its own forward, layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str], Tensor]
"""Canonical name -> the tensor, in the orientation of memory."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.\d+$")


@dataclass(kw_only=True)
class Streamed:
    """The memory of a streamed run, and the outputs that `watch` returned, by module name."""

    bytes_now: int = 0
    bytes_peak: int = 0
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A module whose weights are read and dropped together: a layer with its submodules, or a module with weights."""

    name: str
    module: nn.Module
    tensors: list[tuple[nn.Module, str, str]]  # owner, attribute, canonical name


@contextmanager
def streamed(
    module: nn.Module,
    read: Read,
    *,
    canonical: Callable[[str], str],
    device: torch.device,
    dtype: torch.dtype,
    watch: Callable[[str, Any], Tensor | None] = lambda name, output: None,
) -> Iterator[Streamed]:
    """Let a meta model run with weights from `read`; at most one layer is in memory.

    `canonical` returns the canonical name of one of the model's tensors. `watch` may return a part of a layer's output
    to keep. Tables that no file holds (rotary frequencies) must already be filled.
    """
    state = Streamed()
    handles = []
    for unit in _units(module, canonical):
        metas: list[Tensor] = []

        def load(_module: nn.Module, _args: Any, unit: _Unit = unit, metas: list[Tensor] = metas) -> None:
            for owner, attribute, name in unit.tensors:
                metas.append(getattr(owner, attribute))
                tensor = read(name).to(device=device, dtype=dtype)
                assert tensor.shape == metas[-1].shape, f"{name}: {tuple(tensor.shape)} for {tuple(metas[-1].shape)}"
                state.bytes_now += tensor.nbytes
                _put(owner, attribute, tensor)
            state.bytes_peak = max(state.bytes_peak, state.bytes_now)

        def free(_module: nn.Module, _args: Any, output: Any, unit: _Unit = unit, metas: list[Tensor] = metas) -> None:
            for (owner, attribute, _), meta in zip(unit.tensors, metas, strict=True):
                state.bytes_now -= getattr(owner, attribute).nbytes
                _put(owner, attribute, meta)
            metas.clear()
            watched = watch(unit.name, output)
            if watched is not None:
                state.outputs[unit.name] = watched

        handles += [unit.module.register_forward_pre_hook(load), unit.module.register_forward_hook(free)]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


def _units(module: nn.Module, canonical: Callable[[str], str]) -> list[_Unit]:
    units: list[_Unit] = []
    for name, part in module.named_modules():
        if any(name.startswith(unit.name + ".") for unit in units):
            continue
        is_layer = bool(_LAYER.search(name))
        tensors = [
            (owner, attribute, canonical(".".join(filter(None, (name, inner, attribute)))))
            for inner, owner in (part.named_modules() if is_layer else [("", part)])
            for attribute in (*owner._parameters, *owner._buffers)
            if _from_files(owner, attribute)
        ]
        if tensors:
            units.append(_Unit(name=name, module=part, tensors=tensors))
    return units


def _from_files(owner: nn.Module, attribute: str) -> bool:
    return getattr(owner, attribute) is not None and attribute not in owner._non_persistent_buffers_set


def _put(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    if attribute in owner._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, attribute, tensor)

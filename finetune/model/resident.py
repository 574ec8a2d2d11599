"""Frozen weights as buffers: ZeRO does not see them, so nothing is gathered, and each rank holds complete tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def frozen_bytes(module: nn.Module) -> int:
    """Return the bytes of this rank's frozen parameters, unpartitioned; a tied one counts once."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def make_resident(module: nn.Module) -> list[str]:
    """Turn each frozen parameter into a buffer of the same name, and return the names; state-dict keys are unchanged.

    Call it once the trainable parameters are chosen, before the engine starts. Tied weights stay tied.
    """
    made = []
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or parameter.requires_grad:
                continue
            del owner._parameters[name]
            owner.register_buffer(name, _as_buffer(parameter))
            made.append(f"{prefix}.{name}" if prefix else name)
    for owner in module.modules():
        _answer_from_buffers(owner)
    return made


def _as_buffer(parameter: nn.Parameter) -> torch.Tensor:
    """Return the plain tensor of a parameter, the same one for each tied use."""
    known: torch.Tensor | None = getattr(parameter, "resident_tensor", None)
    if known is None:
        known = parameter.data
        parameter.resident_tensor = known  # type: ignore[attr-defined]  # lives as long as the parameter does
    return known


def _answer_from_buffers(owner: nn.Module) -> None:
    """Let `owner.dtype` and `owner.device` read from buffers if the module has no parameter left.

    transformers' models read both from their first parameter (the vision tower's decides the dtype of images).
    """
    kind = type(owner)
    asks = [name for name in ("dtype", "device") if isinstance(getattr(kind, name, None), property)]
    if not asks or any(p.is_floating_point() for p in owner.parameters()):
        return
    if not any(b.is_floating_point() for b in owner.buffers()):
        return
    answers: dict[str, Any] = {name: property(_asks_largest_buffer(name)) for name in asks}
    owner.__class__ = type(kind.__name__, (kind,), {**answers, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _asks_largest_buffer(name: str) -> Callable[[nn.Module], Any]:
    return lambda module: getattr(_largest_buffer(module), name)


def _largest_buffer(module: nn.Module) -> torch.Tensor:
    """Return the buffer that stands for the weights; small float32 tables (rotary frequencies) must not."""
    return max((b for b in module.buffers() if b.is_floating_point()), key=lambda b: b.numel())

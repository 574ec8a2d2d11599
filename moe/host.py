"""A tensor's values in host memory while nobody computes with them.

Copies are in order with the work around them, so the values are the same. Where the device is the host itself (tests),
they are made all the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

LEAST_BYTES = 1 << 20
"""Smaller tensors stay: the way there costs more than they take."""


@dataclass(frozen=True, kw_only=True)
class HostCopy:
    """A tensor's values, and where they are wanted."""

    values: Tensor
    device: torch.device

    def back(self) -> Tensor:
        """Return a fresh tensor on the device."""
        return self.values.to(self.device, non_blocking=True, copy=True)


def to_host(tensor: Tensor) -> HostCopy:
    """Copy it, into page-locked memory; the tensor itself can then go."""
    with _disable_current_modes():  # host memory is none of what a counter of the device's should see
        values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        values.copy_(tensor.detach(), non_blocking=True)
    return HostCopy(values=values, device=tensor.device)


def worth_moving(tensor: Tensor, least_bytes: int) -> bool:
    """Say whether it is large enough, and no index that its owner looks at on the host."""
    return tensor.is_floating_point() and tensor.numel() * tensor.element_size() >= least_bytes

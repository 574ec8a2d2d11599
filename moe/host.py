"""Tensors in host memory for as long as nothing computes with them.

Copies run in order with the work around them, so the values are exact. If the device is the host itself (in tests),
the copies are made regardless.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

BLOCK_BYTES = 1 << 30
"""Bytes of a block of activations: it holds the inputs of several layers, so that little is wasted at its end."""
ALIGNED = 512
"""Bytes to which the start of a piece is aligned; more than any type needs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HostCopy:
    """A copy of a tensor in host memory, and the device to bring it back to; valid for as long as this object lives."""

    values: Tensor
    device: torch.device

    def back(self) -> Tensor:
        """Return a fresh tensor on the device."""
        return self.values.to(self.device, non_blocking=True, copy=True)


@dataclass(kw_only=True, eq=False)
class _Block:
    memory: Tensor
    pinned: bool
    used: int = 0
    copies: "weakref.WeakSet[HostCopy]" = field(default_factory=weakref.WeakSet)


class HostMemory:
    """Host memory in large blocks, handed out in pieces; a block is reused when none of its copies is alive.

    Page-locked memory is allocated at 1 to 2 GB per second, in sizes that are powers of two: allocated per tensor, a
    step's activations would take up to twice their bytes. A block may be overwritten while the device still reads it,
    so all copies to and from one memory must be on one stream; autograd runs backward on the stream of forward.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._blocks: list[_Block] = []

    def copy(self, tensor: Tensor) -> HostCopy:
        """Copy `tensor`, in order with the work around it; the tensor itself may then be freed."""
        with _disable_current_modes():  # a mode that counts device memory must not see host memory
            block = self._with_room(tensor.nbytes, pinned=tensor.is_cuda)
            piece = block.memory[block.used : block.used + tensor.nbytes]
            values = piece.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
        copy = HostCopy(values=values, device=tensor.device)
        block.used += -(-tensor.nbytes // ALIGNED) * ALIGNED
        block.copies.add(copy)
        return copy

    def _with_room(self, needed: int, *, pinned: bool) -> _Block:
        for block in self._blocks:
            if not block.copies:
                block.used = 0
            if block.pinned == pinned and len(block.memory) - block.used >= needed:
                return block
        memory = torch.empty(max(needed, self._block_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._blocks.append(_Block(memory=memory, pinned=pinned))
        return self._blocks[-1]


_activations = HostMemory()


def to_host(tensor: Tensor) -> HostCopy:
    """Copy an activation to page-locked memory; the tensor itself may then be freed."""
    return _activations.copy(tensor)


def worth_moving(tensor: Tensor, least_bytes: int) -> bool:
    """Return whether it is large enough, and not an index that its owner reads on the host."""
    return tensor.is_floating_point() and tensor.numel() * tensor.element_size() >= least_bytes

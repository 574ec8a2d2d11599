"""A tensor's values in host memory while nobody computes with them.

Copies are in order with the work around them, so the values are the same. Where the device is the host itself (tests),
they are made all the same.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

BLOCK_BYTES = 1 << 30
"""Of activations: some layers' inputs each, so that little is left over at its end."""
ALIGNED = 512
"""Where a piece begins; more than any type asks for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HostCopy:
    """A tensor's values, and where they are wanted. They are whole as long as the copy lives."""

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
    """Host memory in large blocks, handed out piece by piece; a block is used again when none of its copies lives.

    Page-locked memory is made at 1 to 2 GB a second, and in sizes that are powers of two: tensor by tensor, a step's
    activations would take up to twice their bytes. A block is written again while the device may still read it, so all
    copies of one memory, there and back, must be made on one stream; autograd runs backward on that of forward.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._blocks: list[_Block] = []

    def copy(self, tensor: Tensor) -> HostCopy:
        """Copy it, in order with the work around; the tensor itself can then go."""
        with _disable_current_modes():  # host memory is none of what a counter of the device's should see
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
    """Copy an activation, into page-locked memory; the tensor itself can then go."""
    return _activations.copy(tensor)


def worth_moving(tensor: Tensor, least_bytes: int) -> bool:
    """Say whether it is large enough, and no index that its owner looks at on the host."""
    return tensor.is_floating_point() and tensor.numel() * tensor.element_size() >= least_bytes

"""A frozen linear layer over a packed matrix, and the buffers in which packed matrices are unpacked."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe.kernels.packed import Packing


class Workspace:
    """Memory in which all layers of a model unpack their matrices, one layer after the other.

    A tensor is valid until the next call with the same key. So the memory is that of the largest layer, and backward
    unpacks again instead of keeping what forward unpacked.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of this shape, with the type and the device of `like`."""
        place, size = (key, like.dtype, like.device), torch.Size(shape).numel()
        memory = self._memory.get(place)
        if memory is None or memory.numel() < size:
            self._memory.pop(place, None)
            del memory  # the smaller one is freed before the larger one is made
            memory = self._memory[place] = torch.empty(size, dtype=like.dtype, device=like.device)
        return memory[:size].view(shape)


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is one row of bytes [1, bytes]."""

    bias: Tensor | None

    def __init__(self, packing: Packing, bias: nn.Parameter | None, workspace: Workspace) -> None:
        super().__init__()
        self.packings = {"weight": packing}
        self.workspace = workspace
        self.in_features, self.out_features = packing.into, packing.out
        packed = torch.empty((1, packing.row_bytes), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)

    def whole(self, like: Tensor) -> Tensor:
        """Return the weight [out, in] in the type of `like`, in memory that the next layer uses again."""
        packing = self.packings["weight"]
        into = self.workspace.take("linear", (1, packing.out, packing.into), like)
        return packing.unpack(self.weight, into)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        y: Tensor = _Linear.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Linear(torch.autograd.Function):
    """Unpacks the weight in forward and again in backward, and saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole(x), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return grad @ ctx.layer.whole(grad), None

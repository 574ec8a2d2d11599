"""The tower's patch embedding as the product that it is."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def embed_flat(tower: Any) -> None:
    """Let each convolution that embeds patches (an adapter's too) be a product wherever its kernel is the whole input.

    The same modules: their weights, names and shapes stay.
    """
    for module in tower.patch_embed.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = PatchConv


class PatchConv(nn.Conv3d):
    """A convolution whose kernel covers its input: rows times the flat weight.

    cuDNN looks for a convolution there, and in some releases takes seconds a call, or has none for backward at all. The
    CPU keeps the convolution: the sums of both differ in their last bits (2e-6 of the largest value in float32), and
    there is nothing to gain.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Return [patches, channels, 1, 1, 1]."""
        whole = tuple(patches.shape[2:]) == tuple(self.kernel_size) and not any(self.padding) and self.groups == 1
        if patches.is_cpu or not whole:
            return super().forward(patches)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]

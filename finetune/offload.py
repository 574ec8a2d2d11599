"""What waits for backward, in host memory: the inputs of the decoder layers under recompute.

Such a layer keeps its input and little else, and over a long row the inputs of all layers together are what fills the
device. Here they go to the host in forward, and come back when the layer's turn comes; what a layer keeps besides goes
the same way (`moe.recompute.contexts`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.host import HostCopy, to_host, worth_moving


@contextmanager
def offloaded(least_bytes: int | None) -> Iterator[None]:
    """Let the operations inside keep values of so many bytes and more in host memory; None: all stay.

    What a layer under recompute saves itself is not seen here, only its inputs. Weights stay where they are.
    """
    if least_bytes is None:
        yield
        return

    def pack(tensor: Tensor) -> Any:
        stays = isinstance(tensor, nn.Parameter) or not worth_moving(tensor, least_bytes)
        return tensor if stays else to_host(tensor)

    def unpack(saved: Any) -> Tensor:
        return saved.back() if isinstance(saved, HostCopy) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield

"""The base's own answer from a model that is being tuned: every low-rank part switched off, for as long as a block.

What trains in full has no copy of its base value and stays as it is; of those a router alone keeps one, for its
agreement statistic, and is switched too. Nothing is moved or copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moe.experts import GroupedExperts
from moe.router import Router


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Leave the adapters out inside the block; every rank must enter it, as fewer weights are gathered there."""
    dense = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    sparse = [layer for layer in module.modules() if isinstance(layer, (GroupedExperts, Router))]
    before = [layer._disable_adapters for layer in dense], [layer.is_adapted for layer in sparse]
    try:
        for layer in dense:
            layer._disable_adapters = True  # PEFT's own switch would also stop the factors from training
        for layer in sparse:
            layer.is_adapted = False
        yield
    finally:
        for layer, off in zip(dense, before[0], strict=True):
            layer._disable_adapters = off
        for layer, on in zip(sparse, before[1], strict=True):
            layer.is_adapted = on

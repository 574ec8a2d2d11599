"""What decides the memory and the traffic of a rank but its configuration, and what of it follows. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.architecture.parts import DECODER
from finetune.planner.activations import Recompute
from finetune.planner.tensors import Tensor

PERSISTENCE, REUSE, SUB_GROUP = 1_000_000, 1_000_000_000, 1_000_000_000
"""The engine's settings, in elements: whole between steps below; what is used again within so many stays whole; so
many of a rank's own are updated at a time."""
BUCKET = (1_000_000, 100_000_000)
"""The engine's setting, in elements: least and most of the bucket through which gradients leave."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything that decides the memory of a rank but the configuration."""

    world: int
    ep: int
    sp: int
    layers: int
    resident: bool
    recompute: Recompute
    itemsize: int
    skew: float = 1.0
    """Rows of the busiest rank over the mean; of a group of one it is 1."""
    supervised_share: float = 1.0
    segmented: bool = False
    device: bool = True
    persistence: int = PERSISTENCE
    tile_tokens: int = 0
    offload: bool = False
    """What recomputed layers keep waits in host memory."""
    reuse: int = REUSE
    """Elements: a weight that is used again within so many is not let go of."""
    sub_group: int = SUB_GROUP

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // self.ep

    def group(self, tensor: Tensor) -> int:
        """Over how many ranks a tensor is cut."""
        return self.replicas if tensor.expert else self.world


def largest_layer(layout: Layout, tensors: Sequence[Tensor]) -> int:
    """Elements of one decoder layer as a rank holds it whole."""
    return sum(tensor.elements for tensor in tensors if tensor.part in DECODER) // layout.layers


def slices(tensors: Sequence[Tensor], layout: Layout) -> int:
    """Elements of this rank's slices."""
    return sum(-(-tensor.elements // layout.group(tensor)) for tensor in tensors)


def small(tensors: Sequence[Tensor], layout: Layout) -> int:
    """Elements of tensors that stay whole between steps; one that is not cut has no second copy."""
    return sum(t.elements for t in tensors if t.elements < layout.persistence and layout.group(t) > 1)


def gathered(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The tensors that are brought together in every micro-batch."""
    return [t for t in tensors if t.elements >= layout.persistence and layout.group(t) > 1]


def bucket(trained: Sequence[Tensor]) -> int:
    """Elements of the bucket through which gradients leave."""
    return min(max(sum(tensor.elements for tensor in trained), BUCKET[0]), BUCKET[1])

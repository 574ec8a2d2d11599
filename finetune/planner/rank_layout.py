"""What decides the memory and the traffic of a rank besides its configuration, and what follows. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.architecture.parts import DECODER
from finetune.architecture.trained import Tensor
from finetune.planner.activations import Recompute
from finetune.ranks.engine_sizes import PERSISTENCE, REUSE, SUB_GROUP, bucket_elements


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Everything that decides the memory of a rank besides the configuration."""

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
    """Whether what recomputed layers keep is held in host memory."""
    reuse: int = REUSE
    sub_group: int = SUB_GROUP

    @property
    def replicas(self) -> int:
        """Return the number of ranks that hold the same experts."""
        return self.world // self.ep

    def group(self, tensor: Tensor) -> int:
        """Return over how many ranks a tensor is cut."""
        return self.replicas if tensor.expert else self.world


def largest_layer(layout: RankLayout, tensors: Sequence[Tensor]) -> int:
    """Return the elements of one decoder layer as a rank holds it whole."""
    return sum(tensor.elements for tensor in tensors if tensor.part in DECODER) // layout.layers


def slices(tensors: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the elements of this rank's slices."""
    return sum(-(-tensor.elements // layout.group(tensor)) for tensor in tensors)


def small(tensors: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the elements of tensors that stay whole between steps; one that is not cut has no second copy."""
    return sum(
        tensor.elements for tensor in tensors if tensor.elements < layout.persistence and layout.group(tensor) > 1
    )


def gathered(tensors: Sequence[Tensor], layout: RankLayout) -> list[Tensor]:
    """Return the tensors that are brought together in every micro-batch."""
    return [tensor for tensor in tensors if tensor.elements >= layout.persistence and layout.group(tensor) > 1]


def bucket(trained: Sequence[Tensor]) -> int:
    """Return the elements of the bucket through which gradients leave."""
    return bucket_elements(sum(tensor.elements for tensor in trained))

"""The layout of a run over its ranks, and the number of elements that each rank holds. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.architecture.parts import DECODER
from finetune.architecture.trained import Tensor
from finetune.planner.activations import Recompute
from finetune.ranks.engine_sizes import PERSISTENCE, REUSE, SUB_GROUP, bucket_elements


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """The values that decide the memory and traffic of a rank, in addition to the configuration."""

    world: int
    ep: int
    sp: int
    layers: int
    resident: bool
    recompute: Recompute
    itemsize: int
    skew: float = 1.0
    """Rows of the busiest rank over the mean; 1 for a group of one."""
    supervised_share: float = 1.0
    segmented: bool = False
    device: bool = True
    persistence: int = PERSISTENCE
    tile_tokens: int = 0
    offload: bool = False
    """Whether the tensors that recomputed layers keep are held in host memory."""
    reuse: int = REUSE
    sub_group: int = SUB_GROUP

    @property
    def replicas(self) -> int:
        """Return the number of ranks that hold the same experts."""
        return self.world // self.ep

    def group(self, tensor: Tensor) -> int:
        """Return the number of ranks over which a tensor is cut."""
        return self.replicas if tensor.expert else self.world


def largest_layer(layout: RankLayout, tensors: Sequence[Tensor]) -> int:
    """Return the elements of one gathered decoder layer."""
    return sum(tensor.elements for tensor in tensors if tensor.part in DECODER) // layout.layers


def slices(tensors: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the elements of this rank's slices."""
    return sum(-(-tensor.elements // layout.group(tensor)) for tensor in tensors)


def size(tensor: Tensor, layout: RankLayout) -> int:
    """Return the bytes of one element."""
    return 1 if tensor.packed else layout.itemsize


def whole_bytes(tensors: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the bytes of tensors that a rank holds complete."""
    return sum(size(tensor, layout) * tensor.elements for tensor in tensors)


def slice_bytes(tensors: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the bytes of this rank's slices."""
    return sum(size(tensor, layout) * slices([tensor], layout) for tensor in tensors)


def small_bytes(tensors: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the bytes of tensors that stay gathered between steps."""
    return sum(size(tensor, layout) * small([tensor], layout) for tensor in tensors)


def small(tensors: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the elements of tensors that stay gathered between steps; uncut tensors have no second copy."""
    return sum(
        tensor.elements for tensor in tensors if tensor.elements < layout.persistence and layout.group(tensor) > 1
    )


def gathered(tensors: Sequence[Tensor], layout: RankLayout) -> list[Tensor]:
    """Return the tensors that are gathered in every micro-batch."""
    return [tensor for tensor in tensors if tensor.elements >= layout.persistence and layout.group(tensor) > 1]


def bucket(trained: Sequence[Tensor]) -> int:
    """Return the elements of the bucket through which gradients leave."""
    return bucket_elements(sum(tensor.elements for tensor in trained))

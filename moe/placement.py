"""Who owns which expert, and how expert tensors are laid out on disk. Plain arithmetic, no torch.

Experts lie in contiguous blocks; the ranks of an expert-parallel group are neighbours, so that its all-to-all stays
inside a node. The ranks that hold the same experts form an expert-data group: adapters are reduced over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Layout = Literal["hub", "transformers"]
"""Orientation of the fused expert tensors.

`hub`: as published, and as transformers 4, vLLM, sglang and Megatron read it: gate_up [E, D, 2F], down [E, F, D].
`transformers`: as transformers 5 holds and saves it, and as we do: gate_up [E, 2F, D], down [E, D, F].
"""

LAYOUTS: tuple[Layout, ...] = ("hub", "transformers")


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The sizes of one layer's experts."""

    experts: int
    hidden: int
    intermediate: int

    def fused(self, layout: Layout) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return the shapes of gate_up and down."""
        e, d, f = self.experts, self.hidden, self.intermediate
        return ((e, d, 2 * f), (e, f, d)) if layout == "hub" else ((e, 2 * f, d), (e, d, f))


def check_ep(*, num_experts: int, world_size: int, ep: int) -> None:
    """Raise ValueError unless `ep` divides both the ranks and the experts."""
    if ep >= 1 and world_size % ep == 0 and num_experts % ep == 0:
        return
    allowed = [
        size for size in range(1, min(world_size, num_experts) + 1) if not world_size % size | num_experts % size
    ]
    raise ValueError(
        f"parallel.ep: {ep} must divide both the {world_size} ranks and the {num_experts} experts; "
        f"one of {', '.join(map(str, allowed))} does"
    )


def expert_range(*, num_experts: int, ep: int, ep_rank: int) -> range:
    """Return the global ids of the experts that rank `ep_rank` of its expert-parallel group owns."""
    assert num_experts % ep == 0
    assert 0 <= ep_rank < ep
    local = num_experts // ep
    return range(ep_rank * local, (ep_rank + 1) * local)


def expert_owner(expert: int, *, num_experts: int, ep: int) -> int:
    """Return which rank of an expert-parallel group owns `expert`."""
    assert 0 <= expert < num_experts
    return expert // (num_experts // ep)


def expert_groups(*, world_size: int, ep: int) -> tuple[tuple[int, ...], ...]:
    """Return the expert-parallel groups, which exchange tokens: neighbours in rank."""
    assert world_size % ep == 0
    return tuple(tuple(range(first, first + ep)) for first in range(0, world_size, ep))


def expert_data_groups(*, world_size: int, ep: int) -> tuple[tuple[int, ...], ...]:
    """Return the expert-data groups, which hold the same experts: equal places in their expert-parallel groups."""
    assert world_size % ep == 0
    return tuple(tuple(range(place, world_size, ep)) for place in range(ep))


def check_fused(name: str, gate_up: Sequence[int], down: Sequence[int], *, shape: ExpertShape, layout: Layout) -> None:
    """Raise ValueError unless the two shapes are those of `layout`."""
    found = (tuple(gate_up), tuple(down))
    if found != shape.fused(layout):
        others = [other for other in LAYOUTS if found == shape.fused(other)]
        raise ValueError(
            f"{name}: {_describe(shape)} have {layout} layout when they are {_pair(*shape.fused(layout))}; "
            f"found {_pair(*found)}" + (f", which is {others[0]} layout" if others else "")
        )


def fused_layout(name: str, gate_up: Sequence[int], down: Sequence[int], *, shape: ExpertShape) -> Layout:
    """Return the layout of a layer's fused expert tensors, or raise ValueError when it is neither.

    One tensor alone can fit both (D = 2F, or D = F) and is never trusted alone; the pair cannot, as D is not both.
    """
    for layout in LAYOUTS:
        if (tuple(gate_up), tuple(down)) == shape.fused(layout):
            return layout
    raise ValueError(
        f"{name}: {_describe(shape)} are {_pair(*shape.fused('hub'))} in hub layout and "
        f"{_pair(*shape.fused('transformers'))} in transformers layout; found {_pair(gate_up, down)}"
    )


def _describe(shape: ExpertShape) -> str:
    return f"{shape.experts} experts of hidden size {shape.hidden} and expert hidden size {shape.intermediate}"


def _pair(gate_up: Sequence[int], down: Sequence[int]) -> str:
    return f"gate_up {list(gate_up)} and down {list(down)}"

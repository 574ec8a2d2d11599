"""Memory of one rank, by component, at each moment of a step that can be the highest. Loads no torch.

The engine's own part follows ZeRO-3 as it is configured here: every partitioned tensor is cut to equal slices, small
ones also stay whole between steps, gradients are added up in float32 slices and leave through one float32 bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.architecture.families import Family
from finetune.architecture.parts import VISION
from finetune.config import RunConfig
from finetune.planner.activations import WIDE
from finetune.planner.moments import Moment, moments
from finetune.planner.rank_layout import Layout, bucket, slices, small
from finetune.planner.tensors import Tensor, frozen_tensors, trained_tensors

RESERVE_BYTES, RESERVE_SHARE = 1.5e9, 0.03
"""Outside tensors on a GPU: context, kernels and communicators; and what the allocator cannot reuse."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """`always` exists between steps; the highest moment comes on top."""

    always: dict[str, int]
    moments: tuple[Moment, ...]
    reserve: int
    weights: int = 0
    """Of the base and what trains, as loading counts them: without spare room, copies and optimiser."""

    @property
    def static(self) -> int:
        """Bytes of tensors between two steps."""
        return sum(self.always.values())

    @property
    def highest(self) -> Moment:
        """The moment that decides."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """Bytes of tensors at the highest moment."""
        return self.static + self.highest.total

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.peak + self.reserve

    @property
    def components(self) -> dict[str, int]:
        """Every part at the highest moment, and the reserve."""
        return {**self.always, **self.highest.parts} | ({"reserve": self.reserve} if self.reserve else {})


def memory(config: RunConfig, base: Family, layout: Layout) -> Memory:
    """The memory of the fullest rank."""
    trained = trained_tensors(base, config.adapters, ep=layout.ep)
    frozen = frozen_tensors(base, config.adapters, ep=layout.ep)
    fixed = _fixed(config, base, layout, trained, frozen)
    even = moments(config, base, replace(layout, skew=1.0), trained, frozen)
    skewed = moments(config, base, layout, trained, frozen)
    found = tuple(
        replace(one, parts={**one.parts, "skew allowance": more}) if (more := other.total - one.total) > 0 else one
        for one, other in zip(even, skewed, strict=True)
    )
    held = _whole(frozen, layout) if layout.resident else slices(frozen, layout)
    weights = layout.itemsize * (held + slices(trained, layout)) + _router(config, base, layout.itemsize)
    planned = Memory(always=fixed, moments=found, reserve=0, weights=weights)
    reserve = int(RESERVE_BYTES + RESERVE_SHARE * planned.peak) if layout.device else 0
    return replace(planned, reserve=reserve)


def _fixed(
    config: RunConfig, base: Family, layout: Layout, trained: Sequence[Tensor], frozen: Sequence[Tensor]
) -> dict[str, int]:
    b, mine = layout.itemsize, slices(trained, layout)
    experts = [tensor for tensor in frozen if tensor.expert]
    visual = [tensor for tensor in frozen if tensor.part in VISION]
    dense = [tensor for tensor in frozen if not tensor.expert and tensor.part not in VISION]
    held = _whole if layout.resident else slices
    way = "resident" if layout.resident else "partitioned"
    parts = {
        f"base, {way}": b * held(dense, layout),
        f"vision tower, {way}": b * held(visual, layout),
        f"expert shard, {way}": b * held(experts, layout) + _room(config, base, layout),
        "trained weights": b * (mine + small(trained, layout)),
        "frozen weights kept whole": 0 if layout.resident else b * small(frozen, layout),
        "router's memory of the base": _router(config, base, b),
        "masters": WIDE * mine,
        "optimiser": 2 * WIDE * mine,
        "gradients": WIDE * mine,
        "gradient bucket": WIDE * bucket(trained),
    }
    return {name: size for name, size in parts.items() if size}


def _whole(tensors: Sequence[Tensor], layout: Layout) -> int:
    return sum(tensor.elements for tensor in tensors)


def _room(config: RunConfig, base: Family, layout: Layout) -> int:
    """Bytes of the spare rows and columns that resident experts keep for their adapters."""
    experts, family = base.text.experts, config.adapters.experts
    if experts is None or family.mode != "lora" or not layout.resident:
        return 0
    local = experts.num_experts // layout.ep
    return layout.itemsize * len(base.moe_layers) * local * family.r * 2 * base.text.hidden_size


def _router(config: RunConfig, base: Family, itemsize: int) -> int:
    experts = base.text.experts
    if experts is None or config.adapters.router.mode != "full":
        return 0
    return itemsize * len(base.moe_layers) * experts.num_experts * base.text.hidden_size

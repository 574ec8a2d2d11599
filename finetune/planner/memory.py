"""Memory of one rank by component, at each moment of a step at which it can be highest. Loads no torch.

The engine's part follows ZeRO-3 as it is configured here: every partitioned tensor is cut into equal slices, and small
tensors also stay gathered between steps. Gradients leave through one float32 bucket and are added up in float32 slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from finetune.architecture.families import Family
from finetune.architecture.parts import VISION
from finetune.architecture.shapes import parameter_shapes
from finetune.architecture.trained import Tensor, frozen_tensors, packing_of, trained_tensors
from finetune.config import RunConfig
from finetune.planner.activations import WIDE
from finetune.planner.moments import Moment, moments
from finetune.planner.rank_layout import RankLayout, bucket, slice_bytes, slices, small, small_bytes, whole_bytes

RESERVE_BYTES = 1.5e9
"""Bytes of a GPU that hold no tensors: context, kernels and communicators."""
RESERVE_SHARE = 0.03
"""Share of the tensors' peak that the allocator cannot reuse."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank: `always` exists between steps, and the highest moment comes on top of it."""

    always: dict[str, int]
    moments: tuple[Moment, ...]
    reserve: int
    weights: int = 0
    """Bytes of the base and of trained parameters as loading counts them: without spare room, copies and optimiser."""

    @property
    def static(self) -> int:
        """Return the bytes of tensors between two steps."""
        return sum(self.always.values())

    @property
    def highest(self) -> Moment:
        """Return the moment that needs the most memory."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """Return the bytes of tensors at the highest moment."""
        return self.static + self.highest.total

    @property
    def total(self) -> int:
        """Return the bytes that the device must provide."""
        return self.peak + self.reserve

    @property
    def components(self) -> dict[str, int]:
        """Return every part at the highest moment, and the reserve."""
        return {**self.always, **self.highest.parts} | ({"reserve": self.reserve} if self.reserve else {})


def memory(config: RunConfig, base: Family, layout: RankLayout) -> Memory:
    """Return the memory of the fullest rank."""
    trained = trained_tensors(base, config.adapters, ep=layout.ep)
    frozen = frozen_tensors(base, config.adapters, ep=layout.ep, quantise=config.model.quantise)
    even = moments(config, base, replace(layout, skew=1.0), trained, frozen)
    skewed = moments(config, base, layout, trained, frozen)
    frozen_bytes = whole_bytes(frozen, layout) if layout.resident else slice_bytes(frozen, layout)
    weights = frozen_bytes + layout.itemsize * slices(trained, layout) + _router(config, base, layout.itemsize)
    planned = Memory(
        always=_always(config, base, layout, trained, frozen),
        moments=tuple(_with_skew(moment, busiest) for moment, busiest in zip(even, skewed, strict=True)),
        reserve=0,
        weights=weights,
    )
    reserve = int(RESERVE_BYTES + RESERVE_SHARE * planned.peak) if layout.device else 0
    return replace(planned, reserve=reserve)


def _with_skew(even: Moment, busiest: Moment) -> Moment:
    """Return the moment with a part for the bytes that the busiest rank needs beyond an even load."""
    more = busiest.total - even.total
    return replace(even, parts={**even.parts, "skew allowance": more}) if more > 0 else even


def _always(
    config: RunConfig, base: Family, layout: RankLayout, trained: Sequence[Tensor], frozen: Sequence[Tensor]
) -> dict[str, int]:
    """Return the bytes that exist between steps, by component."""
    itemsize, trained_slices = layout.itemsize, slices(trained, layout)
    experts = [tensor for tensor in frozen if tensor.expert]
    visual = [tensor for tensor in frozen if tensor.part in VISION]
    dense = [tensor for tensor in frozen if not tensor.expert and tensor.part not in VISION]
    held = whole_bytes if layout.resident else slice_bytes
    way = "resident" if layout.resident else "partitioned"
    parts = {
        f"base, {way}": held(dense, layout),
        f"vision tower, {way}": held(visual, layout),
        f"expert shard, {way}": held(experts, layout) + _spare_room(config, base, layout),
        "unpacked weights of a layer": _unpacked(config, base, layout),
        "trained weights": itemsize * (trained_slices + small(trained, layout)),
        "frozen weights kept whole": 0 if layout.resident else small_bytes(frozen, layout),
        "router's memory of the base": _router(config, base, itemsize),
        "masters": WIDE * trained_slices,
        "optimiser": 2 * _moment_bytes(config) * trained_slices,
        "gradients": WIDE * trained_slices,
        "gradient bucket": WIDE * bucket(trained),
    }
    return {name: size for name, size in parts.items() if size}


def _moment_bytes(config: RunConfig) -> int:
    """Return the bytes on the device of one moment of one element."""
    if config.optim.offload:
        return 0
    return WIDE if config.optim.moments == "float32" else WIDE // 2


def _spare_room(config: RunConfig, base: Family, layout: RankLayout) -> int:
    """Return the bytes of the spare rows and columns that resident experts keep for their adapters."""
    experts, section = base.text.experts, config.adapters.experts
    if experts is None or section.mode != "lora" or not layout.resident or config.model.quantise.experts != "none":
        return 0
    local = experts.num_experts // layout.ep
    return layout.itemsize * len(base.moe_layers) * local * section.r * 2 * base.text.hidden_size


def _unpacked(config: RunConfig, base: Family, layout: RankLayout) -> int:
    """Return the bytes in which a layer's quantised matrices are unpacked, with room for the experts' adapters."""
    experts, section = base.text.experts, config.adapters.experts
    quantise, elements = config.model.quantise, 0
    if experts is not None and quantise.experts != "none":
        room = 2 * section.r if section.mode == "lora" and not section.dropout else 0
        row = 3 * experts.moe_intermediate_size + room
        elements += experts.num_experts // layout.ep * row * base.text.hidden_size
    shapes = parameter_shapes(base).items()
    elements += max((prod(s) for name, s in shapes if len(s) == 2 and packing_of(name, s, quantise)), default=0)
    return layout.itemsize * elements


def _router(config: RunConfig, base: Family, itemsize: int) -> int:
    """Return the bytes of the copies of the base's routers; fully trained routers are compared with them."""
    experts = base.text.experts
    if experts is None or config.adapters.router.mode != "full":
        return 0
    return itemsize * len(base.moe_layers) * experts.num_experts * base.text.hidden_size

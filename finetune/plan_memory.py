"""Memory of one rank, by component, at each moment of a step that can be the highest. Loads no torch.

The engine's own part follows ZeRO-3 as it is configured here: every partitioned tensor is cut to equal slices, small
ones also stay whole between steps, gradients are added up in float32 slices and leave through one float32 bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from finetune.config import RunConfig
from finetune.families import Family
from finetune.plan_activations import WIDE, Recompute, Rows, always, head, layer, tower
from finetune.trained import Tensor, frozen_tensors, trained_tensors

PERSISTENCE = 1_000_000
BUCKET = (1_000_000, 100_000_000)
REUSE, AHEAD = 1_000_000_000, 1.2
"""The engine's settings, in elements: whole between steps below; least and most of the bucket; within so many a
weight is used again and stays whole; so many layers are fetched ahead."""
RESERVE_BYTES, RESERVE_SHARE = 1.5e9, 0.03
"""Outside tensors on a GPU: context, kernels and communicators; and what the allocator cannot reuse."""


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

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // self.ep

    def group(self, tensor: Tensor) -> int:
        """Over how many ranks a tensor is cut."""
        return self.replicas if tensor.expert else self.world


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a step: what exists besides what always does."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


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
    even = _moments(config, base, replace(layout, skew=1.0), trained, frozen)
    skewed = _moments(config, base, layout, trained, frozen)
    moments = tuple(
        replace(one, parts={**one.parts, "skew allowance": more}) if (more := other.total - one.total) > 0 else one
        for one, other in zip(even, skewed, strict=True)
    )
    held = _whole(frozen, layout) if layout.resident else slices(frozen, layout)
    weights = layout.itemsize * (held + slices(trained, layout)) + _router(config, base, layout.itemsize)
    found = Memory(always=fixed, moments=moments, reserve=0, weights=weights)
    reserve = int(RESERVE_BYTES + RESERVE_SHARE * found.peak) if layout.device else 0
    return replace(found, reserve=reserve)


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


def _fixed(
    config: RunConfig, base: Family, layout: Layout, trained: Sequence[Tensor], frozen: Sequence[Tensor]
) -> dict[str, int]:
    b, mine = layout.itemsize, slices(trained, layout)
    experts = [tensor for tensor in frozen if tensor.expert]
    visual = [tensor for tensor in frozen if tensor.part in _VISION]
    dense = [tensor for tensor in frozen if not tensor.expert and tensor.part not in _VISION]
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


_VISION = ("vision_blocks", "patch_embed", "pos_embed", "merger", "deepstack_mergers")


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


def _moments(
    config: RunConfig, base: Family, layout: Layout, trained: Sequence[Tensor], frozen: Sequence[Tensor]
) -> tuple[Moment, ...]:
    """The head, a layer's backward, the tower, and the update."""
    rows, adapters = micro_batch(config, base, layout), config.adapters
    recompute, count = layout.recompute, len(base.moe_layers)
    sparse, dense = (
        layer(base, adapters, rows, recompute, sparse=kind, ep=layout.ep)
        if (count if kind else base.text.num_hidden_layers - count)
        else None
        for kind in (True, False)
    )
    kinds = [(one, n) for one, n in ((sparse, count), (dense, base.text.num_hidden_layers - count)) if one is not None]
    kept = sum(n * (one.saved if recompute == "none" else one.kept) for one, n in kinds)
    if layout.offload and recompute != "none":  # on the device: the layer at work, and the next on its way
        kept = min(kept, 2 * max(one.kept for one, _ in kinds))
    tower_kept, tower_once = tower(base, adapters, rows, recompute)
    gather = layout.itemsize * _gather(layout, trained, frozen)
    stays = {"activations kept": kept, "row and embeddings": always(base, rows), "vision activations": tower_kept}
    widest = max((one for one, _ in kinds), key=lambda one: one.saved + one.exchange + one.working)
    again = 0.0 if recompute == "none" else widest.saved - widest.returned
    gradients = layout.itemsize * max((t.elements for t in trained), default=0)
    return (
        _moment("head and loss", {**stays, "head and loss": head(base, rows, trained=adapters.head.mode == "full"),
                                  "gather buffers": gather}),
        _moment("backward of a layer", {
            **stays, "one layer recomputed": again, "one layer's gradients": widest.working + gradients,
            "all-to-all buffers": widest.exchange, "gather buffers": gather,
        }),
        _moment("vision tower", {"vision activations": tower_kept, "tower at work": tower_once,
                                 "gather buffers": gather}),
        _moment("update", {"gradients as the optimiser sees them": WIDE * slices(trained, layout)}),
    )  # fmt: skip


def waiting(config: RunConfig, base: Family, layout: Layout) -> int:
    """Bytes of one rank's activations that wait in host memory."""
    if not layout.offload or layout.recompute == "none":
        return 0
    rows, sparse = micro_batch(config, base, layout), len(base.moe_layers)
    counts = ((True, sparse), (False, base.text.num_hidden_layers - sparse))
    return int(sum(
        n * layer(base, config.adapters, rows, layout.recompute, sparse=kind, ep=layout.ep).kept
        for kind, n in counts if n
    ))  # fmt: skip


def _moment(name: str, parts: dict[str, float]) -> Moment:
    return Moment(name=name, parts={key: int(size) for key, size in parts.items() if size >= 1})


def micro_batch(config: RunConfig, base: Family, layout: Layout) -> Rows:
    """The fullest row that a rank gets, and how many rows its experts get."""
    tokens = -(-config.data.tokens_per_pack // layout.sp)
    vision = config.data.vision_tokens_per_pack
    patches = (config.data.tokens_per_pack if vision is None else vision) * base.vision.spatial_merge_size**2
    experts = base.text.experts
    return Rows(
        tokens=tokens,
        supervised=int(tokens * layout.supervised_share),
        patches=-(-patches // layout.sp),  # a group's ranks share out the row's frames
        arriving=0 if experts is None else layout.skew * tokens * experts.num_experts_per_tok,
        itemsize=layout.itemsize,
        segmented=layout.segmented,
        tiles=-(-tokens // layout.tile_tokens) if layout.tile_tokens else 1,
    )


DECODER = ("attention", "experts", "router", "mlp", "norms")


def largest_layer(layout: Layout, tensors: Sequence[Tensor]) -> int:
    """Elements of one decoder layer as a rank holds it whole."""
    return sum(tensor.elements for tensor in tensors if tensor.part in DECODER) // layout.layers


def _gather(layout: Layout, trained: Sequence[Tensor], frozen: Sequence[Tensor]) -> int:
    """Elements that partitioned weights take while they are whole."""
    parts = [*trained, *(() if layout.resident else frozen)]
    wide = [tensor.elements for tensor in gathered(parts, layout)]
    live = layout.reuse + max([AHEAD * largest_layer(layout, parts), *wide])
    return min(sum(wide), int(live))

"""The moments of a step that can be the highest, and what a rank holds at each beside what it always does.

Each part is one sum of tensors that are named where they are counted: activations in `finetune.planner.activations` and
`finetune.planner.vision`, gathered weights here. Loads no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.architecture.families import Family
from finetune.architecture.parts import DECODER, VISION
from finetune.config import RunConfig
from finetune.planner.activations import WIDE, Layer, Reach, Rows, embedded, head, layer, row
from finetune.planner.rank_layout import BUCKET, Layout, bucket, gathered, largest_layer, slices
from finetune.planner.tensors import Tensor
from finetune.planner.vision import pixels, tower

AHEAD, LEAST_AHEAD = 1.2, 50_000_000
"""The engine's settings: so many layers, and at least so many elements, are fetched ahead."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a step: what exists besides what always does."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def moments(
    config: RunConfig, base: Family, layout: Layout, trained: Sequence[Tensor], frozen: Sequence[Tensor]
) -> tuple[Moment, ...]:
    """From the tower's forward to the update, as far as what trains reaches."""
    rows, adapters, reach = micro_batch(config, base, layout), config.adapters, Reach.of(config.adapters)
    kinds, recomputes = _layers(config, base, layout, rows), layout.recompute != "none"
    waits = layout.offload and recomputes
    kept = sum(n * (one.stays if waits else one.kept if recomputes else one.saved) for one, n in kinds)
    seen = tower(base, adapters, rows, layout.recompute)
    here = {"row": row(rows, values=pixels(base))}
    stays = {"activations kept": reach.layers * kept, "embeddings": embedded(base, rows), **here}
    stays |= {"vision activations": seen.kept}
    widest = max((one for one, _ in kinds), key=lambda one: one.saved + one.exchange + one.working)
    # what the second pass hands on, and the layer's input, are kept already, unless they come back from the host
    again = recomputes * (widest.saved - (0.0 if waits else widest.returned + widest.shared))
    gradients = layout.itemsize * max((t.elements for t in trained), default=0)
    weights = (*trained, *(() if layout.resident else frozen))
    trains = {tensor.part for tensor in trained}
    used = (*DECODER, *(part for part in VISION if reach.tower or part in trains))
    last = rows.tokens * base.text.hidden_size * (WIDE + rows.itemsize)
    passing = widest.passing if recomputes or not reach.layers else 0.0
    most = max(sum(tensor.elements for tensor in group) for group in _groups(trained))
    behind = _gather(layout, weights, used, forward=False)
    every = (
        _moment("vision tower", here, {"tower at work": seen.forward}, _gather(layout, weights, None, forward=True)),
        _moment(
            "end of forward", stays,
            {"vision features": seen.outputs, "one layer at work": max(last, passing)},
            _gather(layout, weights, (*used, "head"), forward=True),
        ),
        _moment(
            "head and loss", stays, {"head and loss": head(base, rows, trained=adapters.head.mode == "full")},
            _gather(layout, weights, (*used, "head"), forward=False),
        ),
        _moment("backward of a layer", *([
            stays, {"one layer recomputed": again, "one layer's gradients": widest.working + gradients},
            {"all-to-all buffers": widest.exchange}, behind,
        ] if reach.layers else ())),
        _moment("backward of a vision block", *([
            here, {"vision activations": seen.kept, "vision features": seen.outputs},
            {"one block recomputed": seen.again, "one block's gradients": seen.working + gradients}, behind,
        ] if seen.working else ())),
        # the bucket is emptied once it is full, at the latest when backward is over
        _moment("gradients leave", *([stays, behind] if bucket(trained) == BUCKET[1] else [here]),
                {"gradients in one tensor": WIDE * min(bucket(trained), most)}),
        _moment("update", {"gradients as the optimiser sees them": WIDE * _updated(trained, layout)}),
    )  # fmt: skip
    return tuple(one for one in every if one.parts)


def _updated(trained: Sequence[Tensor], layout: Layout) -> int:
    """Elements of a rank whose gradients are in one tensor at a time: a group's, closed once it is large enough."""
    largest = max((slices([tensor], layout) for tensor in trained), default=0)
    return min(max(slices(group, layout) for group in _groups(trained)), layout.sub_group + largest)


def _groups(trained: Sequence[Tensor]) -> list[list[Tensor]]:
    """The engine's groups of weights, as far as they are alike in every run: experts', and the others."""
    return [[tensor for tensor in trained if tensor.expert == expert] for expert in (False, True)]


def _layers(config: RunConfig, base: Family, layout: Layout, rows: Rows) -> list[tuple[Layer, int]]:
    """The decoder's layers with experts and without, and how many there are of each."""
    sparse = len(base.moe_layers)
    counts = ((True, sparse), (False, base.text.num_hidden_layers - sparse))
    return [
        (layer(base, config.adapters, rows, layout.recompute, sparse=kind, ep=layout.ep), n) for kind, n in counts if n
    ]


def waiting(config: RunConfig, base: Family, layout: Layout) -> int:
    """Bytes of one rank's activations that wait in host memory."""
    if not layout.offload or layout.recompute == "none":
        return 0
    kinds = _layers(config, base, layout, micro_batch(config, base, layout))
    return int(sum(n * (one.kept - one.stays) for one, n in kinds))


def _moment(name: str, *parts: dict[str, float]) -> Moment:
    every = {key: size for part in parts for key, size in part.items()}
    return Moment(name=name, parts={key: int(size) for key, size in every.items() if size >= 1})


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


def _gather(
    layout: Layout, weights: Sequence[Tensor], parts: Sequence[str] | None, *, forward: bool
) -> dict[str, float]:
    """Bytes of gathered weights: those of `parts` that are whole, and the flat buffers that they arrive in.

    The engine fetches many weights into one buffer, and copies each out of it when the first of them is wanted; the
    buffer goes when the last of them was. It lets go of weights that this micro-batch does not use again, and keeps
    others as far as `reuse` goes: where that is all of them, nothing arrives in backward.
    """
    wide = gathered(weights, layout)
    every, used = sum(t.elements for t in wide), sum(t.elements for t in wide if parts is None or t.part in parts)
    one = largest_layer(layout, weights)
    ahead = max(AHEAD * one, LEAST_AHEAD) if layout.reuse else 0
    arrives = forward or every > layout.reuse + ahead
    whole, flat = min(used, layout.reuse + max(ahead, one)), min(every, ahead) if arrives else 0
    return {"gather buffers": layout.itemsize * (whole + flat)}

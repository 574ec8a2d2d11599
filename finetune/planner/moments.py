"""The moments of a step at which memory can be highest, and the bytes that each adds to those that always exist.

Each part is a sum of tensors, named in the file that counts them: activations in `finetune.planner.activations` and
`finetune.planner.vision`, gathered weights here. Loads no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.architecture.families import Family
from finetune.architecture.parts import DECODER, VISION
from finetune.architecture.trained import Tensor
from finetune.config import RunConfig
from finetune.planner.activations import WIDE, Layer, Reach, Rows, embedded, head, layer, row
from finetune.planner.rank_layout import RankLayout, bucket, gathered, largest_layer, slices, whole_bytes
from finetune.planner.vision import Tower, pixels, tower
from finetune.ranks.engine_sizes import LEAST_PREFETCH, MOST_BUCKET, PREFETCHED_LAYERS, UPDATED


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a step, with the bytes that exist at it only."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.parts.values())


def moments(
    config: RunConfig, base: Family, layout: RankLayout, trained: Sequence[Tensor], frozen: Sequence[Tensor]
) -> tuple[Moment, ...]:
    """Return the moments from the tower's forward to the update, without those that no gradient reaches."""
    rows, reach = micro_batch(config, base, layout), Reach.of(config.adapters)
    layers = _layers(config, base, layout)
    widest = max((layer for layer, _ in layers), key=lambda layer: layer.saved + layer.exchange + layer.working)
    last_norm = rows.tokens * base.text.hidden_size * (WIDE + rows.itemsize)
    keeps_all = layout.recompute == "none" and reach.layers
    seen = tower(base, config.adapters, rows, layout.recompute)
    of_row = {"row": row(rows, values=pixels(base))}
    stays = {"activations kept": reach.layers * _kept(layers, layout), "embeddings": embedded(base, rows)}
    stays |= {**of_row, "vision activations": seen.kept}
    weights = (*trained, *(() if layout.resident else frozen))
    trains = {tensor.part for tensor in trained}
    used = (*DECODER, *(part for part in VISION if reach.tower or part in trains))
    behind = _gather(layout, weights, used, forward=False)
    gradients = layout.itemsize * max((tensor.elements for tensor in trained), default=0)
    bucket_is_full = bucket(trained) == MOST_BUCKET  # a full bucket is emptied during backward
    group = max(sum(tensor.elements for tensor in group) for group in _groups(trained))
    every = [
        _moment("vision tower", of_row, {"tower at work": seen.forward}, _gather(layout, weights, None, forward=True)),
        _moment(
            "end of forward",
            stays,
            {
                "vision features": seen.outputs,
                "one layer at work": max(last_norm, 0.0 if keeps_all else widest.passing),
            },
            _gather(layout, weights, (*used, "head"), forward=True),
        ),
        _moment(
            "head and loss",
            stays,
            {"head and loss": head(base, rows, trained=config.adapters.head.mode == "full")},
            _gather(layout, weights, (*used, "head"), forward=False),
        ),
    ]
    if reach.layers:
        every.append(_moment("backward of a layer", stays, _backward(widest, layout, gradients), behind))
    if seen.working:
        every.append(_moment("backward of a vision block", of_row, _vision_backward(seen, gradients), behind))
    every += [
        _moment(
            "gradients leave",
            *((stays, behind) if bucket_is_full else (of_row,)),
            {"gradients in one tensor": WIDE * min(bucket(trained), group)},
        ),
        _moment("update", _update(config, _updated(trained, layout))),
    ]
    return tuple(moment for moment in every if moment.parts)


def _kept(layers: Sequence[tuple[Layer, int]], layout: RankLayout) -> float:
    """Return the bytes that all layers keep on the device for backward, or for their second pass."""
    if layout.recompute == "none":
        return sum(number * layer.saved for layer, number in layers)
    return sum(number * (layer.stays if layout.offload else layer.kept) for layer, number in layers)


def _backward(widest: Layer, layout: RankLayout, gradients: int) -> dict[str, float]:
    """Return the bytes that backward of the widest layer needs, with the gradient of the largest tensor."""
    # the tensors that the second pass reuses, and the layer's input, are counted as kept unless they wait on the host
    kept_already = 0.0 if layout.offload else widest.returned + widest.shared
    return {
        "one layer recomputed": 0.0 if layout.recompute == "none" else widest.saved - kept_already,
        "one layer's gradients": widest.working + gradients,
        "all-to-all buffers": widest.exchange,
    }


def _vision_backward(seen: Tower, gradients: int) -> dict[str, float]:
    """Return the bytes that backward of a block of the tower needs, with those that all blocks keep."""
    return {
        "vision activations": seen.kept,
        "vision features": seen.outputs,
        "one block recomputed": seen.again,
        "one block's gradients": seen.working + gradients,
    }


def _update(config: RunConfig, elements: int) -> dict[str, float]:
    """Return the bytes that an update of this many elements needs."""
    stored = config.optim.moments != "float32" or config.optim.offload
    return {
        "gradients as the optimiser sees them": WIDE * elements,
        "moments of a piece": 2 * WIDE * min(elements, UPDATED) if stored else 0,
    }


def _updated(trained: Sequence[Tensor], layout: RankLayout) -> int:
    """Return the elements of a rank whose gradients share one tensor: a group, closed once it is large enough."""
    largest = max((slices([tensor], layout) for tensor in trained), default=0)
    return min(max(slices(group, layout) for group in _groups(trained)), layout.sub_group + largest)


def _groups(trained: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the engine's groups of weights that exist in every run: those of experts, and the others."""
    return [[tensor for tensor in trained if tensor.expert == expert] for expert in (False, True)]


def _layers(config: RunConfig, base: Family, layout: RankLayout) -> list[tuple[Layer, int]]:
    """Return the decoder's layers with and without experts, and the number of each."""
    rows, sparse = micro_batch(config, base, layout), len(base.moe_layers)
    counts = {True: sparse, False: base.text.num_hidden_layers - sparse}
    return [
        (layer(base, config.adapters, rows, layout.recompute, sparse=kind, ep=layout.ep), number)
        for kind, number in counts.items()
        if number
    ]


def waiting(config: RunConfig, base: Family, layout: RankLayout) -> int:
    """Return the bytes of one rank's activations that are held in host memory."""
    if not layout.offload or layout.recompute == "none":
        return 0
    return int(sum(number * (layer.kept - layer.stays) for layer, number in _layers(config, base, layout)))


def _moment(name: str, *parts: dict[str, float]) -> Moment:
    every = {key: size for part in parts for key, size in part.items()}
    return Moment(name=name, parts={key: int(size) for key, size in every.items() if size >= 1})


def micro_batch(config: RunConfig, base: Family, layout: RankLayout) -> Rows:
    """Return the fullest row that a rank can get, and the number of rows that its experts get."""
    tokens = -(-config.data.tokens_per_pack // layout.sp)
    vision = config.data.vision_tokens_per_pack
    patches = (config.data.tokens_per_pack if vision is None else vision) * base.vision.spatial_merge_size**2
    experts = base.text.experts
    return Rows(
        tokens=tokens,
        supervised=int(tokens * layout.supervised_share),
        patches=-(-patches // layout.sp),  # the ranks of a group divide the row's frames among them
        arriving=0 if experts is None else layout.skew * tokens * experts.num_experts_per_tok,
        itemsize=layout.itemsize,
        segmented=layout.segmented,
        tiles=-(-tokens // layout.tile_tokens) if layout.tile_tokens else 1,
    )


def _gather(
    layout: RankLayout, weights: Sequence[Tensor], parts: Sequence[str] | None, *, forward: bool
) -> dict[str, float]:
    """Return the bytes of the gathered weights of `parts`, and of the flat buffers in which they arrive.

    The engine fetches many weights into one buffer and copies each out of it when the first of them is needed; it
    frees the buffer after the last copy. It releases weights that this micro-batch does not use again, and keeps up to
    `reuse` elements of the others: if that is all of them, nothing is fetched in backward.
    """
    wide = gathered(weights, layout)
    every = sum(tensor.elements for tensor in wide)
    used = sum(tensor.elements for tensor in wide if parts is None or tensor.part in parts)
    itemsize = whole_bytes(wide, layout) / every if every else layout.itemsize  # between bytes and whole weights
    of_layer = largest_layer(layout, weights)
    ahead = max(PREFETCHED_LAYERS * of_layer, LEAST_PREFETCH) if layout.reuse else 0
    whole = min(used, layout.reuse + max(ahead, of_layer))
    arrives = forward or every > layout.reuse + ahead
    flat = min(every, ahead) if arrives else 0
    return {"gather buffers": itemsize * (whole + flat)}

"""Lists the operations of the vision tower in one micro-batch. Loads no torch.

They are those that transformers runs, except that all images attend in one call and one product embeds the patches. A
test counts a block and a merger on the meta device.
"""

from finetune.architecture.families import Family
from finetune.config import AdaptersConfig
from finetune.planner.activations import Reach, Recompute, Rows
from finetune.planner.layer import BACKWARD
from finetune.planner.operations import (
    WIDE,
    Op,
    Passes,
    Trains,
    cast,
    linear,
    linear_again,
    linear_back,
    routing,
    touch,
)
from finetune.planner.vision import TAKEN, pixels


def tower(
    base: Family, adapters: AdaptersConfig, rows: Rows, recompute: Recompute, *, frame_squares: float
) -> list[tuple[Passes, int]]:
    """Return each part with its number of repeats; `frame_squares` is the sum of the frames' squared patches."""
    vision = base.vision
    b, p = rows.itemsize, rows.patches
    trains, levels = Reach.of(adapters).tower, len(vision.deepstack_visual_indexes)
    blocks = block(base, adapters, rows, recompute, frame_squares=frame_squares)
    return [
        (Passes(forward=_enter(base, p, b)), 1),
        (blocks, vision.depth),
        (merger(base, adapters.merger, p, b, below=trains), 1),
        (merger(base, adapters.deepstack_mergers, p, b, below=trains), levels),
    ]


def _enter(base: Family, p: int, b: int) -> list[Op]:
    """Return the embedding of patches, learned positions interpolated from four around each, and rotary tables."""
    values, width = pixels(base), base.vision.hidden_size
    table = width // base.vision.num_heads
    ops = touch(p * values, 1 + WIDE, 2 * WIDE, 2 * WIDE, cast(b))
    ops += [Op("dense mm", b * (p * values + values * width + p * width), 2 * p * values * width)]
    ops += touch(TAKEN * p * width, 2 * b, b + WIDE, WIDE) + touch(p * width, cast(b), 3 * b)
    return [*ops, *touch(p * table, *(2 * WIDE,) * 10)]


def block(base: Family, adapters: AdaptersConfig, rows: Rows, recompute: Recompute, *, frame_squares: float) -> Passes:
    """Return the operations of one block, with backward if a part of the tower trains."""
    vision, family = base.vision, adapters.vision_blocks
    b, p = rows.itemsize, rows.patches
    width, inner = vision.hidden_size, vision.intermediate_size
    size = p * width
    lse, flops = WIDE * p * vision.num_heads, 4 * width * frame_squares
    times = 2 * WIDE + WIDE / vision.num_heads  # heads share the tables
    turned = touch(size, cast(b), times, 4, 8, times, 12, cast(b))
    forward = [*touch(size, 2 * b), *linear(p, width, 3 * width, b, family), *turned, *turned]
    forward += [Op("attention", 4 * b * size + lse, flops), *linear(p, width, width, b, family)]
    forward += [*touch(size, 3 * b, 2 * b), *linear(p, width, inner, b, family), *touch(p * inner, 2 * b)]
    again = [*forward, *linear_again(p, inner, width, b, family)] if recompute != "none" else []
    forward += [*linear(p, inner, width, b, family), *touch(size, 3 * b)]
    if not Reach.of(adapters).tower:
        return Passes(forward=forward)
    back = [*_linear_back(p, inner, width, b, family), *touch(p * inner, 3 * b)]
    back += [*_linear_back(p, width, inner, b, family), *touch(size, 3 * b, 3 * b)]
    back += [*_linear_back(p, width, width, b, family), Op("attention", 8 * b * size + lse, BACKWARD * flops)]
    back += touch(lse, 1) + [routing(1)] + touch(size, *(b, 2 * b) * 3)
    turned = touch(size, cast(b), times, times, 4, *(4, 4) * 2, 12, 12, cast(b))
    back += [*turned, *turned, *touch(3 * size, 2 * b, 2 * b), *_linear_back(p, width, 3 * width, b, family)]
    back += touch(size, 3 * b, 3 * b)
    return Passes(forward=forward, again=again, backward=back)


def merger(base: Family, family: Trains, p: int, b: int, *, below: bool) -> Passes:
    """Return the operations that merge four patches into one token; they are never recomputed."""
    vision = base.vision
    width, rows = vision.hidden_size * vision.spatial_merge_size**2, p // vision.spatial_merge_size**2
    size = rows * width
    forward = [*touch(size, 2 * b), *linear(rows, width, width, b, family), *touch(size, 2 * b)]
    forward += linear(rows, width, vision.out_hidden_size, b, family)
    if not below and family.mode == "frozen":
        return Passes(forward=forward)
    back = [*_linear_back(rows, width, vision.out_hidden_size, b, family), *touch(size, 3 * b)]
    back += _linear_back(rows, width, width, b, family, down=below)
    back += touch(size, 3 * b) if below or family.mode == "full" else []
    return Passes(forward=forward, backward=back)


def _linear_back(rows: int, into: int, out: int, b: int, family: Trains, *, down: bool = True) -> list[Op]:
    """Return the gradients of a projection with a bias: those of one without, and the gradient of the bias."""
    bias = touch(rows * out, b) if family.mode == "full" else []
    return [*linear_back(rows, into, out, b, family, down=down), *bias]

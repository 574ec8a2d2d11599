"""What the vision tower keeps and needs at once in one micro-batch, from the operations that it runs. Loads no torch.

Letters: P patches, W width, I inner width, b bytes of an activation. A patch is a row of the tower; four of them make
one token behind a merger, whose rows are four times as wide: so a merger's matrices are W wide, too, counted by patch.
"""

from dataclasses import dataclass
from typing import Literal

from finetune.architecture.families import Family, Vision
from finetune.config import AdaptersConfig
from finetune.planner.activations import INDEX, WIDE, Reach, Recompute, Rows

TAKEN = 4
"""Of the learned positions, those around a patch whose mean is its own."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Bytes of the whole tower."""

    kept: float
    """For backward, from the tower's forward on."""
    outputs: float
    """Merged tokens and every DeepStack level: until the text model's forward is over, and once more as gradients."""
    forward: float
    """In forward of the last block: what is kept and put out by then, and what the block needs at once."""
    again: float
    """One block, recomputed."""
    working: float
    """Gradients in backward of a block, in the MLP or behind it, where the MLP's states are gone already."""


def tower(base: Family, adapters: AdaptersConfig, rows: Rows, recompute: Recompute) -> Tower:
    """One call of the tower with all patches of a row."""
    vision, b, p = base.vision, rows.itemsize, rows.patches
    width, inner, levels = vision.hidden_size, vision.intermediate_size, len(vision.deepstack_visual_indexes)
    before = sum(index < vision.depth - 1 for index in vision.deepstack_visual_indexes)
    level = p // vision.spatial_merge_size**2 * vision.out_hidden_size * b
    trains = Reach.of(adapters).tower
    last, deep = (_merger(adapters, part, width * b, below=trains) for part in ("merger", "deepstack_mergers"))
    around = _around(vision, b)
    widest = _forward(vision, b, lora=adapters.vision_blocks.mode == "lora")
    kept, block, working = 0.0, 0.0, 0.0
    if trains:
        block = _block(vision, adapters, b)
        tables = 2 * width // vision.num_heads * WIDE  # every block's backward turns with them once more
        kept = tables + vision.depth * (block if recompute == "none" else width * b)
        around -= tables
        widest = max(0.0, widest - (block if recompute == "none" else width * b))  # of the last block, what is kept
        working = max((2 * inner + 2 * width) * b, 4 * width * (b + WIDE) - (2 * inner + width) * b)
        if adapters.patch_embed.mode != "frozen":
            kept += pixels(base) * b
            around -= pixels(base) * b
    return Tower(
        kept=p * (kept + last + levels * deep),
        outputs=(1 + levels) * level,
        forward=p * (kept + before * deep + around + widest) + before * level,
        again=0.0 if recompute == "none" else p * (block - width * b),  # its input is kept
        working=p * working,
    )


def pixels(base: Family) -> int:
    """Values of one patch as the tower takes it; as bytes, what a video's patch is before that."""
    return _values(base.vision)


def _values(vision: Vision) -> int:
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def _around(vision: Vision, b: int) -> float:
    """Of a patch, while blocks work: its values, its position's embedding in float32 with what it came from, tables."""
    values = _values(vision) * b
    positions = vision.hidden_size * WIDE + TAKEN * (INDEX + WIDE) + 2 * INDEX
    return values + positions + 2 * vision.hidden_size // vision.num_heads * WIDE


def _forward(vision: Vision, b: int, *, lora: bool) -> float:
    """Of a patch, the widest point of forward: where positions are looked up, or inside a block.

    A block holds its input and the normed one. Then, turning: queries, keys and values as one tensor, both copied to
    float32 unless they are, turned queries, and three products of the keys'. Attending: the turned ones, each frame's
    output, all frames' in one, and the projection of it. In the MLP: the state between, and the wide one twice.
    LoRA adds its product, and that product scaled, beside each projection's output.
    """
    width, inner = vision.hidden_size, vision.intermediate_size
    looked_up = width * b + TAKEN * width * (b + WIDE)
    projecting = (2 + 9) * width * b if lora else 0
    turning = 5 * width * b + (0 if b == WIDE else 2 * width * WIDE) + 4 * width * WIDE
    attending = (2 + 3 + 2 + 2 + (3 if lora else 1)) * width * b
    mlp = (3 * width + max(3 * inner if lora else 2 * inner, 2 * inner + (3 if lora else 1) * width)) * b
    return max(looked_up, projecting, turning, attending, mlp)


def _block(vision: Vision, adapters: AdaptersConfig, b: int) -> float:
    """Of a patch, what one block keeps for backward.

    Both norms' inputs, with mean and deviation; queries, keys and values as one tensor, for the values in it; turned
    queries and keys; the attention's output and log sums; the wide state before its activation. Where the block itself
    trains, or has adapters: both normed states, the frames' outputs in one tensor, and the activated wide state.
    """
    width, inner, family = vision.hidden_size, vision.intermediate_size, adapters.vision_blocks
    kept = (2 + 3 + 2 + 1) * width * b + inner * b + 4 * WIDE + vision.num_heads * WIDE
    if family.mode != "frozen":
        kept += (3 * width + inner) * b
    return kept + (4 * family.r * b if family.mode == "lora" else 0)


def _merger(
    adapters: AdaptersConfig, part: Literal["merger", "deepstack_mergers"], state: float, *, below: bool
) -> float:
    """Of a patch, what one merger keeps, in states of the tower; mergers are never recomputed.

    What goes into its activation, where anything of it or `below` it trains. With weights or adapters of its own the
    normed and the activated state, too; and the one that its norm reads, if that trains and no block keeps it.
    """
    mode = getattr(adapters, part).mode
    if mode == "frozen":
        return state if below else 0.0
    return (4 if mode == "full" and not below else 3) * state

"""What the vision tower keeps and needs at once in one micro-batch, from the operations that it runs. Loads no torch.

A patch is a row of the tower. Four of them make one token behind a merger, whose rows are four times as wide; so
counted by patch a merger's matrices are as wide as the tower, too.
"""

from dataclasses import dataclass
from typing import Literal

from finetune.architecture.families import Family, Vision
from finetune.config import AdaptersConfig
from finetune.planner.activations import INDEX, WIDE, Reach, Recompute, Rows

TAKEN = 4
"""Learned positions around a patch, whose mean is its own."""


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
    """One block, recomputed, without its input, which is kept."""
    working: float
    """Gradients in backward of a block, in the MLP or behind it, where the MLP's states are gone already."""


def tower(base: Family, adapters: AdaptersConfig, rows: Rows, recompute: Recompute) -> Tower:
    """Return the bytes of one call of the tower with all patches of a row."""
    vision, itemsize = base.vision, rows.itemsize
    width, inner = vision.hidden_size, vision.intermediate_size
    levels = len(vision.deepstack_visual_indexes)
    levels_by_then = sum(index < vision.depth - 1 for index in vision.deepstack_visual_indexes)
    level = rows.patches // vision.spatial_merge_size**2 * vision.out_hidden_size * itemsize
    state = width * itemsize
    trains = Reach.of(adapters).tower
    merger = _merger(adapters, "merger", state, below=trains)
    deep_merger = _merger(adapters, "deepstack_mergers", state, below=trains)
    around = _around(vision, itemsize)
    widest = _forward(vision, itemsize, lora=adapters.vision_blocks.mode == "lora")
    kept = again = working = 0.0
    if trains:
        block = _block(vision, adapters, itemsize)
        kept_of_block = block if recompute == "none" else state
        tables = 2 * width // vision.num_heads * WIDE  # every block's backward turns with them once more
        kept = tables + vision.depth * kept_of_block
        around -= tables
        widest = max(0.0, widest - kept_of_block)  # of the last block, what is kept is counted already
        again = block - kept_of_block
        working = max(
            (2 * inner + 2 * width) * itemsize, 4 * width * (itemsize + WIDE) - (2 * inner + width) * itemsize
        )
        if adapters.patch_embed.mode != "frozen":
            kept += pixels(base) * itemsize
            around -= pixels(base) * itemsize
    return Tower(
        kept=rows.patches * (kept + merger + levels * deep_merger),
        outputs=(1 + levels) * level,
        forward=rows.patches * (kept + levels_by_then * deep_merger + around + widest) + levels_by_then * level,
        again=rows.patches * again,
        working=rows.patches * working,
    )


def pixels(base: Family) -> int:
    """Return the values of one patch as the tower takes it; as bytes, what a patch of a video is before that."""
    return _values(base.vision)


def _values(vision: Vision) -> int:
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def _around(vision: Vision, itemsize: int) -> float:
    """Return a patch's bytes beside the blocks: its values, its position in float32 with what made it, and tables."""
    values = _values(vision) * itemsize
    positions = vision.hidden_size * WIDE + TAKEN * (INDEX + WIDE) + 2 * INDEX
    return values + positions + 2 * vision.hidden_size // vision.num_heads * WIDE


def _forward(vision: Vision, itemsize: int, *, lora: bool) -> float:
    """Return a patch's bytes at the widest point of forward: where positions are looked up, or inside a block.

    A block holds its input and the normed one. Then, turning: queries, keys and values as one tensor, both copied to
    float32 unless they are, turned queries, and three products of the keys'. Attending: the turned ones, each frame's
    output, all frames' in one, and the projection of it. In the MLP: the state between, and the wide one twice.
    LoRA adds its product, and that product scaled, beside each projection's output.
    """
    state, wide_state = vision.hidden_size * itemsize, vision.hidden_size * WIDE
    inner = vision.intermediate_size * itemsize
    looked_up = state + TAKEN * (state + wide_state)
    projecting = (2 + 9) * state if lora else 0
    turning = 5 * state + (0 if itemsize == WIDE else 2 * wide_state) + 4 * wide_state
    attending = (2 + 3 + 2 + 2 + (3 if lora else 1)) * state
    mlp = 3 * state + max(3 * inner if lora else 2 * inner, 2 * inner + (3 if lora else 1) * state)
    return max(looked_up, projecting, turning, attending, mlp)


def _block(vision: Vision, adapters: AdaptersConfig, itemsize: int) -> float:
    """Return what one block keeps of a patch for backward.

    Both norms' inputs, with mean and deviation; queries, keys and values as one tensor, for the values in it; turned
    queries and keys; the attention's output and log sums; the wide state before its activation. Where the block itself
    trains, or has adapters: both normed states, the frames' outputs in one tensor, and the activated wide state.
    """
    width, inner = vision.hidden_size, vision.intermediate_size
    section = adapters.vision_blocks
    kept = (2 + 3 + 2 + 1) * width * itemsize + inner * itemsize + 4 * WIDE + vision.num_heads * WIDE
    if section.mode != "frozen":
        kept += (3 * width + inner) * itemsize
    return kept + (4 * section.r * itemsize if section.mode == "lora" else 0)


def _merger(
    adapters: AdaptersConfig, part: Literal["merger", "deepstack_mergers"], state: float, *, below: bool
) -> float:
    """Return what one merger keeps of a patch, given the bytes of a state; mergers are never recomputed.

    What goes into its activation, where anything of it or `below` it trains. With weights or adapters of its own the
    normed and the activated state, too; and the one that its norm reads, if that trains and no block keeps it.
    """
    mode = getattr(adapters, part).mode
    if mode == "frozen":
        return state if below else 0.0
    return (4 if mode == "full" and not below else 3) * state

"""Counts the activation bytes of the vision tower in one micro-batch, from the operations that it runs. Loads no torch.

A patch is a row of the tower. A merger turns four of them into one row that is four times as wide. Counted per patch, a
merger's states are therefore as wide as the tower's.
"""

from dataclasses import dataclass
from typing import Literal

from finetune.architecture.families import Family, Vision
from finetune.config import AdaptersConfig
from finetune.planner.activations import INDEX, WIDE, Reach, Recompute, Rows

TAKEN = 4
"""Learned positions around a patch, which are interpolated to its own position."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Bytes of the complete tower."""

    kept: float
    """Kept for backward, from the tower's forward on."""
    outputs: float
    """Merged tokens and every DeepStack level: until the end of the text model's forward, and again as gradients."""
    forward: float
    """The peak, in forward of the last block: tensors kept and returned until then, and those of the block."""
    again: float
    """One recomputed block, without its input, which is kept."""
    working: float
    """Gradients in backward of a block, in the MLP or after it, when the MLP's states are released."""


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
        tables = 2 * width // vision.num_heads * WIDE  # the backward of every block uses them again
        kept = tables + vision.depth * kept_of_block
        around -= tables
        widest = max(0.0, widest - kept_of_block)  # the bytes that the last block keeps are counted already
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
    """Return the values of one patch as the tower reads it, which is also its bytes before conversion."""
    return _values(base.vision)


def _values(vision: Vision) -> int:
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def _around(vision: Vision, itemsize: int) -> float:
    """Return the bytes of a patch outside the blocks: values, interpolation of positions in float32, and tables."""
    values = _values(vision) * itemsize
    positions = vision.hidden_size * WIDE + TAKEN * (INDEX + WIDE) + 2 * INDEX
    return values + positions + 2 * vision.hidden_size // vision.num_heads * WIDE


def _forward(vision: Vision, itemsize: int, *, lora: bool) -> float:
    """Return the bytes of a patch at the peak of forward: where positions are looked up, or inside a block.

    A block holds its input and the normed input. During rotation it also holds queries, keys and values as one tensor,
    float32 copies of queries and keys, the rotated queries, and three products for the keys. During attention it holds
    the rotated queries and keys, the output of each frame, their concatenation, and its projection. In the MLP it holds
    the state after attention, and the wide state twice. With LoRA, each projection also holds its low-rank product and
    the scaled product.
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
    """Return the bytes that one block keeps per patch for backward.

    They are the inputs of both norms, with mean and deviation; queries, keys and values as one tensor, because of the
    values in it; rotated queries and keys; the attention's output and log sums; and the wide state before its
    activation. A block that trains or has adapters also keeps both normed states, the concatenated outputs of the
    frames, and the activated wide state.
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
    """Return the bytes that one merger keeps per patch, given the bytes of a state; mergers are never recomputed.

    A merger keeps the input of its activation if it or anything `below` it trains. If the merger itself trains, it also
    keeps the normed and the activated state, and the input of its norm if the norm trains and no block keeps it.
    """
    mode = getattr(adapters, part).mode
    if mode == "frozen":
        return state if below else 0.0
    return (4 if mode == "full" and not below else 3) * state

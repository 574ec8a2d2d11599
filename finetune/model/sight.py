"""What the tower is shown of a row, and where what it sees belongs: found on the CPU, before the row leaves.

transformers' tower makes its borders, rotary positions and interpolation from the grids, and waits for the device some
ten times on the way. It takes all of them ready made, under the names below. Its patch embedding is computed as the
product that it is.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from data.render.vision import VisionSpec
from data.stream.batch import Batch, media_places
from finetune.model.sequence import SequenceGroup
from finetune.model.sequence_vision import Delivery, delivery, shares


@dataclass(frozen=True, kw_only=True)
class Look:
    """One call of the tower."""

    arguments: dict[str, Any]
    """What the tower would else make of the grids."""
    at_N: Tensor
    """Where the tower's tokens belong in this rank's slice: images' first, then videos', as the tower has them."""
    delivery: Delivery | None
    """How they get there, where a row is shared."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A model's tower, and the tokens that stand for what it sees."""

    tower: Any
    spec: VisionSpec
    image_id: int
    video_id: int

    def look(self, batch: Batch, part: slice, group: SequenceGroup | None) -> tuple[Batch, Look | None]:
        """Return the row with the patches that this rank looks at, and the call of the tower; None: it is skipped.

        A row without media is shown a blank where the tower trains or is partitioned, as other ranks gather it then.
        """
        images_at, videos_at = media_places(
            batch, merge=self.spec.merge, image_id=self.image_id, video_id=self.video_id
        )
        if not len(images_at) and not len(videos_at) and self.may_rest():
            return batch, None
        grids = torch.cat([batch.image_grids, batch.video_grids])
        at_N = torch.cat([images_at, videos_at])
        plan = None
        if group is not None:
            runs = shares([(t, h, w) for t, h, w in grids.tolist()], group.size)
            mine = runs[group.rank]
            plan = delivery(at_N, runs, group, part=part, merge=self.spec.merge)
            at_N = at_N[(at_N >= part.start) & (at_N < part.stop)] - part.start
            batch = _patches(batch, slice(mine.first, mine.last))
            grids = grids.new_tensor(mine.grids).view(-1, 3)
        if not len(grids):
            grids = grids.new_tensor([[1, self.spec.merge, self.spec.merge]])
        return batch, Look(arguments=tower_arguments(self.tower, grids), at_N=at_N, delivery=plan)

    def may_rest(self) -> bool:
        """Say whether no rank would miss this one in the tower: nothing of it trains, nothing is gathered for it."""
        return not any(p.requires_grad or hasattr(p, "ds_id") for p in self.tower.parameters())


def tower_arguments(tower: Any, grids: Tensor) -> dict[str, Any]:
    """Return what transformers' tower pops from its keyword arguments, as it would make it of these grids.

    And the borders as numbers, which it hands down to its attention.
    """
    merge = tower.config.spatial_merge_size
    cuts = get_vision_cu_seqlens(grids)
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=merge,
    )
    return {
        "grid_thw": grids,
        "cu_seqlens": cuts,
        "max_seqlen": int(cuts.diff().max()),
        "position_ids": get_vision_position_ids(grids, merge),
        "interp_indices": indices,
        "interp_weights": weights,
        "borders": tuple(cuts.tolist()),
    }


def _patches(batch: Batch, chosen: slice) -> Batch:
    """The row with some of its patches only, counted over images and then videos."""
    images = len(batch.image_patches)
    first, last = max(0, chosen.start - images), max(0, chosen.stop - images)
    return replace(
        batch,
        image_patches=batch.image_patches[chosen.start : min(chosen.stop, images)],
        video_patches=batch.video_patches[first:last],
    )


def embed_flat(tower: Any) -> None:
    """Let each convolution that embeds patches (an adapter's too) be a product wherever its kernel is the whole input.

    The same modules: their weights, names and shapes stay.
    """
    for module in tower.patch_embed.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = PatchConv


class PatchConv(nn.Conv3d):
    """A convolution whose kernel covers its input: rows times the flat weight.

    cuDNN looks for a convolution there, and in some releases takes seconds a call, or has none for backward at all. The
    CPU keeps the convolution: the sums of both differ in their last bits (2e-6 of the largest value in float32), and
    there is nothing to gain.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Return [patches, channels, 1, 1, 1]."""
        whole = tuple(patches.shape[2:]) == tuple(self.kernel_size) and not any(self.padding) and self.groups == 1
        if patches.is_cpu or not whole:
            return super().forward(patches)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]

"""The vision tower's input for a row, and the places of its output, computed on the CPU before the row is copied.

transformers' tower computes its borders, rotary positions and interpolation from the grids, and waits for the device
about ten times meanwhile. It also accepts all of them precomputed, under the names below. Its patch embedding is
computed as a matrix product.
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
    """The arguments that the tower would otherwise compute from the grids."""
    at_N: Tensor
    """Places of the tower's tokens in this rank's slice: images first, then videos, in the tower's order."""
    delivery: Delivery | None
    """How the tokens get there if the row is shared, else None."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A model's tower, and the tokens that its outputs replace."""

    tower: Any
    spec: VisionSpec
    image_id: int
    video_id: int

    def look(self, batch: Batch, part: slice, group: SequenceGroup | None) -> tuple[Batch, Look | None]:
        """Return the row with this rank's patches, and the call of the tower; None: the tower is not called.

        For a row without media, the tower gets a blank if it trains or is partitioned, because other ranks gather it.
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
        """Return whether a rank may skip the tower: nothing in it trains and nothing is gathered for it."""
        return not any(p.requires_grad or hasattr(p, "ds_id") for p in self.tower.parameters())


def tower_arguments(tower: Any, grids: Tensor) -> dict[str, Any]:
    """Return the keyword arguments that transformers' tower would otherwise compute from these grids.

    They include the borders as numbers, which the tower passes down to its attention.
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
    """Return the row with only some of its patches, counted over images and then videos."""
    images = len(batch.image_patches)
    first, last = max(0, chosen.start - images), max(0, chosen.stop - images)
    return replace(
        batch,
        image_patches=batch.image_patches[chosen.start : min(chosen.stop, images)],
        video_patches=batch.video_patches[first:last],
    )


def embed_flat(tower: Any) -> None:
    """Compute each convolution that embeds patches (an adapter's too) as a product if its kernel covers the input.

    The modules stay the same, with their weights, names and shapes.
    """
    for module in tower.patch_embed.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = PatchConv


class PatchConv(nn.Conv3d):
    """A convolution whose kernel covers its input: rows times the flattened weight.

    cuDNN would search for a convolution algorithm; in some releases it takes seconds per call, or finds none for
    backward. The CPU keeps the convolution: the sums of both differ in their last bits (2e-6 of the largest value in
    float32), and the product gains nothing there.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Return [patches, channels, 1, 1, 1]."""
        whole = tuple(patches.shape[2:]) == tuple(self.kernel_size) and not any(self.padding) and self.groups == 1
        if patches.is_cpu or not whole:
            return super().forward(patches)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]

"""The model as the engine sees it: `forward(batch)`, one packed row in, its losses out.

With a sequence group the row is shared: each rank of the group takes its slice of the tokens and its share of the
images, and returns the losses of the labels that its tokens predict.

Every rank calls the vision tower exactly once a micro-batch, with all images and videos of its row, or with one blank
patch block where there are none. Otherwise ranks would gather different weights, and hang; in backward too, so what the
tower made of the blank stays in the graph: no token of it is taken, its pooled output and every DeepStack level get
zero gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.batch import Batch
from data.vision import VisionSpec, normalise
from finetune.loss import Losses, Normalise, row_losses, tile_head
from finetune.offload import offloaded
from finetune.sequence import SequenceGroup, divisible, own_part, own_valid
from finetune.sequence_vision import deliver, delivery, shares

Measure = Callable[["PackedModel", Batch, slice], Any]
"""(model, divisible row, this rank's tokens of it) -> anything"""


class PackedModel(nn.Module):
    """A Qwen3-VL (or text-only) model of transformers, from a packed row to its losses.

    `spec` says how the base cuts images; None for a model without a tower. `sequence` is the group that shares a row,
    set by a stage of the run: the model's attention must then be of `finetune.sequence_attention`. Call it as
    `model(batch=...)`: DeepSpeed's hooks look into positional arguments, and would warn of a type they do not know.
    """

    model: Any

    def __init__(
        self, model: nn.Module, *, spec: VisionSpec | None, normalise: Normalise = "token",
    ) -> None:  # fmt: skip
        super().__init__()
        tower = getattr(model.model, "visual", None)
        if (tower is None) != (spec is None):
            has = "has a vision tower" if tower is not None else "has no vision tower"
            raise ValueError(f"the model {has}, but spec is {spec}: read_spec(base folder) gives a tower's, else None")
        tile_head(model)
        self.model, self.spec, self.normalise = model, spec, normalise
        self.sequence: SequenceGroup | None = None
        self.host_from_bytes: int | None = None
        """Inputs of layers of this size and more wait for backward in host memory; None: on the device."""

    def forward(self, batch: Batch, measure: Measure | None = None) -> Any:
        """Return the losses of one packed row, or of this rank's slice; every rank must call this equally often.

        With `measure`, return what that makes of the row: evaluation enters here too, where the engine's hooks are.
        """
        batch = divisible(batch, self.sequence)
        part = own_part(batch, self.sequence)
        if measure is not None:
            return measure(self, batch, part)
        losses: Losses = row_losses(self.model.lm_head, self.hidden(batch), batch, self.normalise, part=part)
        return losses

    def valid(self, batch: Batch) -> Tensor:
        """Return which tokens that this rank routes belong to a sample."""
        return own_valid(batch, self.sequence)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states of the row, or of this rank's slice of a divisible one: [T, D]."""
        part = own_part(batch, self.sequence)
        positions = batch.positions[..., part]
        seen: dict[str, Any] = {"position_ids": positions[0]}
        if self.spec is not None:
            seen = {"position_ids": positions, "mm_encoder_outputs": self._see(batch, self.spec)}
        elif len(batch.image_patches) or len(batch.video_patches):
            raise ValueError(f"images or videos, but the model has no vision tower: {', '.join(batch.keys)}")
        if self.sequence is not None:
            seen["sequence"] = self.sequence  # transformers hands it down to the attention
        # no mask, no cache: with either, attention would leak between the samples of the row
        with offloaded(self.host_from_bytes):
            out = self.model.model(
                input_ids=batch.input_ids[:, part], attention_mask=None, use_cache=False, **seen, **batch.attention
            )
        hidden_TD: Tensor = out.last_hidden_state[0]
        return hidden_TD

    def _see(self, batch: Batch, spec: VisionSpec) -> dict[str, BaseModelOutputWithPooling]:
        """Call the tower, once, and divide what it saw into images and videos, in transformers' own form."""
        if self.sequence is not None:
            return self._see_share(batch, spec, self.sequence)
        everything = slice(0, len(batch.image_patches) + len(batch.video_patches))
        seen = self._look(batch, spec, everything, torch.cat([batch.image_grids, batch.video_grids]))
        images, videos = (len(part) // spec.merge**2 for part in (batch.image_patches, batch.video_patches))
        return _as_outputs(seen, images, videos)

    def _look(self, batch: Batch, spec: VisionSpec, patches: slice, grids: Tensor) -> list[Tensor]:
        """Call the tower on some of the row's patches, or on a blank; return its levels, the pooled output first."""
        tower, images = self.model.model.visual, len(batch.image_patches)
        first, last = max(0, patches.start - images), max(0, patches.stop - images)
        chosen = (batch.image_patches[patches.start : min(patches.stop, images)], batch.video_patches[first:last])
        parts = [normalise(part, spec=spec, dtype=tower.dtype) for part in chosen if len(part)]
        if not parts:
            parts = [_blank(batch.input_ids.device, spec, tower.dtype)]
            grids = grids.new_tensor([[1, spec.merge, spec.merge]])
        pixels = parts.pop() if len(parts) == 1 else torch.cat(parts)
        parts.clear()  # the tower runs for long, and two copies of a row's pixels take much
        seen = tower(pixels, grid_thw=grids, return_dict=True)
        return [seen.pooler_output, *seen.deepstack_features]

    def _see_share(self, batch: Batch, spec: VisionSpec, group: SequenceGroup) -> dict[str, BaseModelOutputWithPooling]:
        """Call the tower on this rank's share, and get what the whole group saw of this rank's slice."""
        grids = torch.cat([batch.image_grids, batch.video_grids])
        runs = shares([(t, h, w) for t, h, w in grids.tolist()], group.size)
        config, mine = self.model.config, runs[group.rank]
        plan = delivery(
            batch, runs, group, merge=spec.merge, image_id=config.image_token_id, video_id=config.video_token_id
        )
        levels = self._look(batch, spec, slice(mine.first, mine.last), grids.new_tensor(mine.grids).view(-1, 3))
        arrived = deliver(levels, plan, group)
        return _as_outputs(arrived, plan.images, sum(plan.receive) - plan.images)


def _blank(device: torch.device, spec: VisionSpec, dtype: torch.dtype) -> Tensor:
    """Return the smallest input the tower takes: the patches of one token, all grey."""
    return torch.zeros(spec.merge**2, 3 * spec.temporal * spec.patch**2, device=device, dtype=dtype)


def _as_outputs(levels: list[Tensor], images: int, videos: int) -> dict[str, BaseModelOutputWithPooling]:
    """Divide the tower's levels into images and videos. Without either, the graph stays: no row is taken."""
    outputs = {}
    if images or not videos:
        outputs["image"] = _rows(levels, slice(0, images))
    if videos:
        outputs["video"] = _rows(levels, slice(images, images + videos))
    return outputs


def _rows(levels: list[Tensor], rows: slice) -> BaseModelOutputWithPooling:
    """Return some tokens of the tower's levels; each level as a tuple of one, where transformers has one an image."""
    pooled, *deepstack = (level[rows] for level in levels)
    part = BaseModelOutputWithPooling(pooler_output=(pooled,))
    part.deepstack_features = [(level,) for level in deepstack]
    return part

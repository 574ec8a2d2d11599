"""The model as the engine sees it: `forward(batch)`, one packed row in, its losses out.

Every rank calls the vision tower exactly once a micro-batch, with all images and videos of its row, or with one blank
patch block where there are none. Otherwise ranks would gather different weights, and hang; in backward too, so what the
tower made of the blank stays in the graph: no token of it is taken, its pooled output and every DeepStack level get
zero gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.batch import Batch
from data.vision import VisionSpec, normalise
from finetune.loss import Losses, Normalise, row_losses, tile_head


class PackedModel(nn.Module):
    """A Qwen3-VL (or text-only) model of transformers, from a packed row to its losses.

    `spec` says how the base cuts images; None for a model without a tower. Call it as `model(batch=...)`: DeepSpeed's
    hooks look into positional arguments, and would warn of a type they do not know.
    """

    model: Any

    def __init__(self, model: nn.Module, *, spec: VisionSpec | None, normalise: Normalise = "token") -> None:
        super().__init__()
        tower = getattr(model.model, "visual", None)
        if (tower is None) != (spec is None):
            has = "has a vision tower" if tower is not None else "has no vision tower"
            raise ValueError(f"the model {has}, but spec is {spec}: read_spec(base folder) gives a tower's, else None")
        tile_head(model)
        self.model, self.spec, self.normalise = model, spec, normalise

    def forward(self, batch: Batch) -> Losses:
        """Return the losses of one packed row; every rank must call this equally often."""
        return row_losses(self.model.lm_head, self.hidden(batch), batch, self.normalise)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the row's last hidden states, [T, D]."""
        seen: dict[str, Any] = {"position_ids": batch.positions[0]}
        if self.spec is not None:
            seen = {"position_ids": batch.positions, "mm_encoder_outputs": self._see(batch, self.spec)}
        elif len(batch.image_patches) or len(batch.video_patches):
            raise ValueError(f"images or videos, but the model has no vision tower: {', '.join(batch.keys)}")
        # no mask, no cache: with either, attention would leak between the samples of the row
        out = self.model.model(
            input_ids=batch.input_ids, attention_mask=None, use_cache=False, **seen, **batch.attention
        )
        hidden_TD: Tensor = out.last_hidden_state[0]
        return hidden_TD

    def _see(self, batch: Batch, spec: VisionSpec) -> dict[str, BaseModelOutputWithPooling]:
        """Call the tower, once, and divide what it saw into images and videos, in transformers' own form."""
        tower = self.model.model.visual
        patches = (batch.image_patches, batch.video_patches)
        parts = [normalise(part, spec=spec, dtype=tower.dtype) for part in patches if len(part)]
        grids = torch.cat([batch.image_grids, batch.video_grids])
        if not parts:
            parts = [_blank(batch.input_ids.device, spec, tower.dtype)]
            grids = grids.new_tensor([[1, spec.merge, spec.merge]])
        seen = tower(torch.cat(parts), grid_thw=grids, return_dict=True)
        images, videos = (len(part) // spec.merge**2 for part in patches)
        outputs = {}
        if images or not videos:  # neither: no row of the blank's is taken, and its graph stays
            outputs["image"] = _rows(seen, slice(0, images))
        if videos:
            outputs["video"] = _rows(seen, slice(images, images + videos))
        return outputs


def _blank(device: torch.device, spec: VisionSpec, dtype: torch.dtype) -> Tensor:
    """Return the smallest input the tower takes: the patches of one token, all grey."""
    return torch.zeros(spec.merge**2, 3 * spec.temporal * spec.patch**2, device=device, dtype=dtype)


def _rows(seen: Any, rows: slice) -> BaseModelOutputWithPooling:
    """Return some tokens of the tower's output; every level as a tuple of one, where transformers has one an image."""
    part = type(seen)(pooler_output=(seen.pooler_output[rows],))
    part.deepstack_features = [(level[rows],) for level in seen.deepstack_features]
    return part

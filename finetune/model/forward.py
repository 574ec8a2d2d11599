"""The model as the engine sees it: `forward(batch)` takes one packed row and returns its losses.

With a sequence group the row is shared: each rank of the group takes its slice of the tokens and its share of the
images, and returns the losses of the labels that its tokens predict.

If a part of the vision tower trains or is partitioned, every rank calls the tower exactly once per micro-batch: with
all images and videos of its row, or with one blank patch block if it has none. Otherwise ranks would gather different
weights and hang, in backward too. So the tower's output for the blank stays in the graph: no token of it is used, and
its pooled output and every DeepStack level get zero gradients. Any other tower is not called for a row without media.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data.render.vision import VisionSpec, normalise
from data.stream.batch import Batch
from finetune.model.loss import Losses, Normalise, row_losses, tile_head
from finetune.model.nodes import join_nodes
from finetune.model.recompute import offloaded
from finetune.model.row import Coming, Grouping, Row, lay_out
from finetune.model.sequence import SequenceGroup
from finetune.model.sequence_vision import deliver
from finetune.model.sight import Look, Sight, embed_flat
from finetune.model.varlen import attend_at_once

Measure = Callable[["PackedModel", Row], Any]


class PackedModel(nn.Module):
    """A Qwen3-VL (or text-only) model of transformers that turns a packed row into its losses.

    `spec` says how the base cuts images; None for a model without a tower. `sequence` is the group that shares a row,
    set by a stage of the run: the model's attention must then be from `finetune.model.sequence_attention`. Call it as
    `model(batch=...)`: DeepSpeed's hooks inspect positional arguments and would warn of a type they do not know.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        spec: VisionSpec | None,
        normalise: Normalise = "token",
    ) -> None:
        super().__init__()
        tower = getattr(model.model, "visual", None)
        if (tower is None) != (spec is None):
            has = "has a vision tower" if tower is not None else "has no vision tower"
            raise ValueError(f"the model {has}, but spec is {spec}: pass read_spec(base folder) for a tower, else None")
        tile_head(model)
        join_nodes(model)
        self.model = model
        self.spec = spec
        self.normalise = normalise
        self.sight: Sight | None = None
        if spec is not None:
            attend_at_once(tower)
            embed_flat(tower)
            place_levels(self.model.model.language_model)
            config = self.model.config
            self.sight = Sight(tower=tower, spec=spec, image_id=config.image_token_id, video_id=config.video_token_id)
        self.sequence: SequenceGroup | None = None
        self.host_from_bytes: int | None = None
        """Bytes from which the inputs of layers wait for backward in host memory; None: they stay on the device."""

    def send(self, batch: Batch, device: torch.device, grouping: Grouping | None = None) -> Coming[Row]:
        """Lay out a row on the host, and start to copy it to the device; call this before the previous forward ends.

        The row is laid out for the sequence group that is set at the time of the call.
        """
        return Coming(lay_out(batch, self.sequence, self.sight, grouping), device)

    def forward(self, batch: Batch | Row, measure: Measure | None = None) -> Any:
        """Return the losses of one packed row, or of this rank's slice; every rank must call this equally often.

        With `measure`, return its result instead. Evaluation uses this forward too, because the engine's hooks are
        attached to it.
        """
        row = batch if isinstance(batch, Row) else self.send(batch, self.model.lm_head.weight.device).arrived()
        if measure is not None:
            return measure(self, row)
        losses: Losses = row_losses(self.model.lm_head, self.hidden(row), row, self.normalise)
        return losses

    def hidden(self, row: Row) -> Tensor:
        """Return the last hidden states of the row, or of this rank's slice of a divisible one: [T, D]."""
        positions = row.batch.positions[..., row.part]
        levels = self._see(row, row.look) if row.look is not None else []
        more: dict[str, Any] = {"position_ids": positions if self.spec is not None else positions[0], **row.attention}
        if self.sequence is not None:
            more["sequence"] = self.sequence  # transformers passes it down to the attention
        inner = self.model.model
        with offloaded(self.host_from_bytes):
            embeds = inner.get_input_embeddings()(row.batch.input_ids[:, row.part])
            if row.look is not None:
                pooled, *deepstack = levels
                embeds = embeds.index_copy(1, row.look.at_N, pooled.to(embeds.dtype)[None])
                more |= {"visual_pos_masks": row.look.at_N, "deepstack_visual_embeds": deepstack}
            # neither mask nor cache: with either, attention would leak between the samples of the row
            out = getattr(inner, "language_model", inner)(
                inputs_embeds=embeds, attention_mask=None, use_cache=False, **more
            )
        hidden_TD: Tensor = out.last_hidden_state[0]
        return hidden_TD

    def _see(self, row: Row, look: Look) -> list[Tensor]:
        """Call the tower once, on this rank's patches or a blank; return its levels for this rank's tokens."""
        assert self.spec is not None
        tower, batch = self.model.model.visual, row.batch
        shown = [part for part in (batch.image_patches, batch.video_patches) if len(part)]
        parts = [normalise(part, spec=self.spec, dtype=tower.dtype) for part in shown]
        if not parts:
            parts = [_blank(batch.input_ids.device, self.spec, tower.dtype)]
        pixels = parts.pop() if len(parts) == 1 else torch.cat(parts)
        parts.clear()  # the tower runs for a long time, and a second copy of a row's pixels takes much memory
        seen = tower(pixels, return_dict=True, **look.arguments)
        levels = [seen.pooler_output, *seen.deepstack_features]
        if look.delivery is not None and self.sequence is not None:
            return deliver(levels, look.delivery, self.sequence)
        return [level[: len(look.at_N)] for level in levels]


def place_levels(language: Any) -> None:
    """Let a text model add the tower's levels at given indices, so that nothing waits for the count of a mask."""
    by_mask = language._deepstack_process

    def add(hidden: Tensor, at: Tensor, level: Tensor) -> Tensor:
        if at.dtype == torch.bool:  # from transformers' own forward, if the same model generates
            masked: Tensor = by_mask(hidden, at, level)
            return masked
        return hidden.index_add(1, at, level.to(hidden.dtype)[None])

    language._deepstack_process = add


def _blank(device: torch.device, spec: VisionSpec, dtype: torch.dtype) -> Tensor:
    """Return the smallest input that the tower takes: the patches of one token, all grey."""
    return torch.zeros(spec.merge**2, 3 * spec.temporal * spec.patch**2, device=device, dtype=dtype)

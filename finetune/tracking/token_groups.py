"""The kind and the source of each token, by which the load of the experts is counted."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.render.sample import Renderer
from data.stream.batch import Batch
from finetune.architecture.families import Family
from finetune.config import RunConfig
from finetune.settings.stages import run_stages
from moe.expert_load import StepLoad

KINDS = ("text", "image", "video", "other")
"""Kinds of tokens; `other` are the control tokens of the chat template, such as those that begin a turn or an image."""


class TokenGroups:
    """Numbers the groups of a row's tokens: first the kinds, then the sources."""

    def __init__(self, sources: Sequence[str], *, image_id: int, video_id: int, control_ids: Iterable[int]) -> None:
        self._numbers = {name: len(KINDS) + number for number, name in enumerate(sources)}
        self._media_ids = {KINDS.index("image"): image_id, KINDS.index("video"): video_id}
        self._control_ids = torch.tensor(sorted(control_ids), dtype=torch.int64)

    def __len__(self) -> int:
        return len(KINDS) + len(self._numbers)

    def __call__(self, batch: Batch) -> Tensor:
        """Return each token's kind and its source, as int64 [2, T]; those of padding mean nothing."""
        ids_T = batch.input_ids[0]
        kinds_T = torch.isin(ids_T, self._control_ids) * KINDS.index("other")
        for kind, token in self._media_ids.items():
            kinds_T = kinds_T.masked_fill(ids_T == token, kind)
        # the last one is for padding, whose sample is -1
        sources_S = torch.tensor([*(self._numbers[key.partition("/")[0]] for key in batch.keys), len(KINDS)])
        return torch.stack([kinds_T, sources_S[batch.sample_ids[0].long()]])


def token_groups(config: RunConfig, base: Family, renderer: Renderer) -> TokenGroups:
    """Return the groups of a run's tokens."""
    return TokenGroups(
        run_sources(config),
        image_id=base.image_token_id,
        video_id=base.video_token_id,
        control_ids=renderer.control_ids,
    )


def run_sources(config: RunConfig) -> list[str]:
    """Return the names of the training sources of all stages of a run."""
    return sorted({name for stage in run_stages(config) for name in stage.data.sources})


def counts_by_group(load: StepLoad, sources: Sequence[str]) -> Mapping[str, Any]:
    """Return the counts of a recorded step by kind and by source; groups without a token are left out."""
    groups = iter(load.groups)
    return {
        division: {name: counts for name, counts in zip(names, groups, strict=False) if any(map(any, counts))}
        for division, names in (("kinds", KINDS), ("sources", sources))
    }

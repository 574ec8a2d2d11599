"""Takes one mechanism out of a loaded model for the length of a `with` block: DeepStack levels, times in the text."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data.render.timestamps import Stamps
from finetune.ask.speaker import Speaker


def level_count(speaker: Speaker) -> int:
    """Return how many DeepStack levels the model has; raise ValueError if it has no tower."""
    if speaker.spec is None:
        raise ValueError("this model has no vision tower, so it sees no pictures; probe it with needle --kind text")
    return len(speaker.module.model.visual.deepstack_merger_list)


@contextmanager
def deepstack_levels(speaker: Speaker, kept: Collection[int]) -> Iterator[None]:
    """Keep only these DeepStack levels (from 0); the features of the others are zeros where the tower yields them."""

    def zeros(merger: Any, args: Any, features: Tensor) -> Tensor:
        return torch.zeros_like(features)

    mergers = speaker.module.model.visual.deepstack_merger_list
    handles = [merger.register_forward_hook(zeros) for at, merger in enumerate(mergers) if at not in kept]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stamped(speaker: Speaker, form: Stamps) -> Iterator[None]:
    """Write the times of frames in this form; "none" leaves them out of the text."""
    before = speaker.renderer
    speaker.renderer = before.with_stamps(form)
    try:
        yield
    finally:
        speaker.renderer = before

"""Sequence parallelism: the ranks of a group hold slices of one packed row, and the engine sees plain data parallelism.

Groups are `sp` contiguous ranks of the data-parallel world, independent of the expert-parallel groups. All ranks of a
group read the same rows (data_rank = rank // sp); each keeps one slice of the tokens, with its positions, labels and
padding mask. Everything except attention works on single tokens and needs no other slice. Attention exchanges heads
for tokens (`sequence_attention`); the images for the vision tower are divided among the ranks (`sequence_vision`).

A row is padded at its end to a multiple of sp, so that slices are equal. The token before a label predicts it, which
may be the last token of the previous slice: every rank has the labels of the entire row, and takes those that its own
tokens predict. Each label then counts once over the group, and the scale contract of `ranks.engine` needs no change:
local sums over all ranks are the sum over all rows. Counts of a *row* (tokens, samples) are taken on the group's first
rank only.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from data.stream.batch import Batch, LossSums, Step
from finetune.ranks.collectives import rank_and_world


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """The ranks that share this rank's rows; `rank` is the number of this rank's slice."""

    size: int
    rank: int
    ranks: dist.ProcessGroup


def sequence_group(sp: int) -> SequenceGroup | None:
    """Make groups of `sp` contiguous ranks and return this rank's, or None if `sp` is 1. Every rank must call this.

    The groups are new, so that their collectives are not ordered with those of the engine or of the experts.
    """
    rank, world = rank_and_world()
    if sp < 1 or world % sp:
        raise ValueError(
            f"parallel.sp: {sp} must divide the {world} ranks, because each group of {sp} ranks shares one row. "
            f"Set parallel.sp=1 for one row per rank"
        )
    if sp == 1:
        return None
    mine = None
    for first in range(0, world, sp):
        group = dist.new_group(list(range(first, first + sp)))
        if first <= rank < first + sp:
            mine = group
    assert mine is not None
    return SequenceGroup(size=sp, rank=rank % sp, ranks=mine)


def sequence_groups(sizes: Iterable[int]) -> dict[int, SequenceGroup | None]:
    """Make the groups of each size that a run uses; every rank must call this."""
    return {sp: sequence_group(sp) for sp in sorted(set(sizes))}


def divisible(batch: Batch, group: SequenceGroup | None) -> Batch:
    """Return the row padded to a multiple of the group's size; the padding is a segment that belongs to no sample."""
    tokens = batch.input_ids.shape[1]
    more = 0 if group is None else -tokens % group.size
    if not more:
        return batch
    behind = torch.arange(more, device=batch.positions.device).expand(4, 1, more)
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, more)),
        loss_weights=pad(batch.loss_weights, (0, more)),
        positions=torch.cat([batch.positions, behind], dim=2),
        sample_ids=pad(batch.sample_ids, (0, more), value=-1),
        cu_seq_lens=pad(batch.cu_seq_lens, (0, 1), value=tokens + more),
        max_length=max(batch.max_length, more),
    )


def own_part(batch: Batch, group: SequenceGroup | None) -> slice:
    """Return the tokens of a divisible row that this rank holds."""
    tokens = batch.input_ids.shape[1]
    if group is None:
        return slice(0, tokens)
    each = tokens // group.size
    return slice(group.rank * each, (group.rank + 1) * each)


def counted_once(step: Step, group: SequenceGroup | None) -> Step:
    """Return the step with its counts on the first rank of a group, and with the same rows but no counts on others."""
    if group is None or group.rank == 0:
        return step
    return replace(step, sums=LossSums(), bad=(), notes=(), tokens=0, images=0, video_seconds=0.0)

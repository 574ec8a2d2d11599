"""Sequence parallelism: the ranks of a group hold slices of one packed row, and the engine sees plain data parallelism.

Groups are `sp` contiguous ranks of the data-parallel world, independent of the expert-parallel groups. All ranks of a
group read the same rows (data_rank = rank // sp); each keeps one slice of the tokens, with its positions, labels and
padding mask. Everything but attention works on tokens one by one and needs no other slice; attention exchanges heads
for tokens (`sequence_attention`), the vision tower's images are shared out (`sequence_vision`).

A row is padded to a multiple of sp behind its end, so that slices are equal. A label is predicted by the token before
it, which may be the last of the slice before: every rank has the whole row's labels, and takes those that its own
tokens predict. Each label then counts once over the group, and the scale contract of `ranks.engine` needs no change:
local sums over all ranks are the sum over all rows. What a *row* counts (tokens, samples) counts on the group's first
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
    """The ranks that share this rank's rows; `rank` is the number of this one's slice."""

    size: int
    rank: int
    ranks: dist.ProcessGroup


def sequence_group(sp: int) -> SequenceGroup | None:
    """Make the groups of `sp` contiguous ranks and return this rank's; None for whole rows. Every rank must call this.

    The groups are new ones: no collective of the engine or of the experts is ordered by theirs.
    """
    rank, world = rank_and_world()
    if sp < 1 or world % sp:
        raise ValueError(
            f"parallel.sp: {sp} must divide the {world} ranks, as each group of so many holds one row. "
            f"Set parallel.sp=1 for whole rows"
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
    """The groups of each size that a run uses; every rank must call this."""
    return {sp: sequence_group(sp) for sp in sorted(set(sizes))}


def divisible(batch: Batch, group: SequenceGroup | None) -> Batch:
    """The row with as many tokens behind it as make it divide: a segment of their own, owned by no sample."""
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
    """The tokens of a divisible row that this rank holds."""
    tokens = batch.input_ids.shape[1]
    if group is None:
        return slice(0, tokens)
    each = tokens // group.size
    return slice(group.rank * each, (group.rank + 1) * each)


def counted_once(step: Step, group: SequenceGroup | None) -> Step:
    """The step with what its rows count, on the first rank of a group; the same rows without it on the others."""
    if group is None or group.rank == 0:
        return step
    return replace(step, sums=LossSums(), bad=(), notes=(), tokens=0, images=0, video_seconds=0.0)

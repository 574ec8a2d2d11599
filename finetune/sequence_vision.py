"""A row's images and videos, shared out over the ranks of its sequence group instead of seen by each of them.

The tower attends inside one frame only, and a frame's positions do not depend on its time, so that a video can be cut
between frames. Frames go to the ranks in their order, cut where patches are closest to even. Every rank calls the tower
exactly once, with a blank where it has no frame. What it made of them, with every DeepStack level, then goes to the
ranks whose slices hold the tokens, in one differentiable all-to-all.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Batch
from finetune.sequence import SequenceGroup, own_part
from moe.dispatch import exchange

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Share:
    """A contiguous run of the row's frames: `first` and `last` count patches, `grids` is what the tower takes."""

    first: int
    last: int
    grids: tuple[Grid, ...]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Which of the tower's tokens go where: `order` are mine sorted by receiver, as rows of what I made."""

    order: Tensor
    send: list[int]
    receive: list[int]
    images: int
    """So many of the tokens that arrive are images', and come first."""
    total: int
    """Visual tokens of the whole row."""


def shares(grids: Sequence[Grid], size: int) -> list[Share]:
    """Cut the frames of a row's images and videos (in the tower's order) into `size` runs of about as many patches."""
    frames = [(item, height * width) for item, (count, height, width) in enumerate(grids) for _ in range(count)]
    ends = [0]
    for _, patches in frames:
        ends.append(ends[-1] + patches)
    total = ends[-1]
    cuts = [min(range(len(ends)), key=lambda n: abs(ends[n] * size - total * part)) for part in range(size + 1)]
    runs = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        counts = Counter(item for item, _ in frames[begin:end])
        mine = tuple((count, *grids[item][1:]) for item, count in counts.items())
        runs.append(Share(first=ends[begin], last=ends[end], grids=mine))
    return runs


def delivery(
    batch: Batch, runs: Sequence[Share], group: SequenceGroup, *, merge: int, image_id: int, video_id: int
) -> Delivery:
    """Plan the way of each visual token, from the rank that saw it to the one whose slice holds it."""
    ids_T = batch.input_ids[0]
    images_at, videos_at = ((ids_T == token).nonzero()[:, 0] for token in (image_id, video_id))
    row_at_N = torch.cat([images_at, videos_at])  # in the tower's order: all images, then all videos
    part = own_part(batch, group)
    receiver_N = row_at_N // (part.stop - part.start)
    made = torch.tensor([(run.last - run.first) // merge**2 for run in runs], device=ids_T.device)
    maker_N = torch.arange(group.size, device=ids_T.device).repeat_interleave(made)
    if len(maker_N) != len(receiver_N):
        raise ValueError(
            f"{', '.join(batch.keys)}: the row has {len(receiver_N)} tokens for images and videos, their patches make "
            f"{len(maker_N)}. The template that wrote the tokens is not of this base"
        )
    counts_SS = torch.bincount(maker_N * group.size + receiver_N, minlength=group.size**2).view(group.size, -1)
    mine_N = receiver_N[maker_N == group.rank]
    here = (images_at >= part.start) & (images_at < part.stop)
    numbers = torch.cat([counts_SS.flatten(), here.sum()[None]]).tolist()  # the one wait for the device
    by_maker = [numbers[row * group.size : (row + 1) * group.size] for row in range(group.size)]
    return Delivery(
        order=mine_N.argsort(stable=True),
        send=by_maker[group.rank],
        receive=[row[group.rank] for row in by_maker],
        images=numbers[-1],
        total=len(receiver_N),
    )


def deliver(levels: Sequence[Tensor], plan: Delivery, group: SequenceGroup) -> list[Tensor]:
    """Send each level's rows to their slices; what arrives is in the tower's order. Every rank of a group must call it.

    `levels` are the tower's outputs of the same tokens; a blank's rows are behind `order` and stay, with their graph.
    """
    rows_ND = torch.cat(list(levels), dim=1)[plan.order]
    if plan.total:
        rows_ND = exchange(rows_ND, plan.receive, plan.send, group.ranks)
    return list(torch.split(rows_ND, [level.shape[1] for level in levels], dim=1))

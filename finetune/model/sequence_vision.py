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

from finetune.model.sequence import SequenceGroup
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


def delivery(at_N: Tensor, runs: Sequence[Share], group: SequenceGroup, *, part: slice, merge: int) -> Delivery:
    """Plan the way of each visual token, from the rank that saw it to the one whose slice holds its place.

    `at_N` are the places in the whole row, in the tower's order; `part` is this rank's slice. All of it on the CPU.
    """
    receiver_N = at_N // (part.stop - part.start)
    made = torch.tensor([(run.last - run.first) // merge**2 for run in runs])
    maker_N = torch.arange(group.size).repeat_interleave(made)
    counts_SS = torch.bincount(maker_N * group.size + receiver_N, minlength=group.size**2).view(group.size, -1)
    return Delivery(
        order=receiver_N[maker_N == group.rank].argsort(stable=True),
        send=counts_SS[group.rank].tolist(),
        receive=counts_SS[:, group.rank].tolist(),
        total=len(at_N),
    )


def deliver(levels: Sequence[Tensor], plan: Delivery, group: SequenceGroup) -> list[Tensor]:
    """Send each level's rows to their slices; what arrives is in the tower's order. Every rank of a group must call it.

    `levels` are the tower's outputs of the same tokens; a blank's rows are behind `order` and stay, with their graph.
    """
    rows_ND = torch.cat(list(levels), dim=1)[plan.order]
    if plan.total:
        rows_ND = exchange(rows_ND, plan.receive, plan.send, group.ranks)
    return list(torch.split(rows_ND, [level.shape[1] for level in levels], dim=1))

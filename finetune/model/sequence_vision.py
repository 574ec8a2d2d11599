"""Divides a row's images and videos among the ranks of its sequence group, instead of showing all of them to each rank.

The tower attends inside one frame only, and a frame's positions do not depend on its time, so a video can be cut
between frames. Frames go to the ranks in order, cut where the numbers of patches are closest to even. Every rank calls
the tower exactly once, with a blank if it has no frame. One differentiable all-to-all then sends the tower's outputs,
with every DeepStack level, to the ranks whose slices hold the tokens.
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
    """A contiguous run of the row's frames: `first` and `last` count patches, `grids` is the tower's input."""

    first: int
    last: int
    grids: tuple[Grid, ...]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """The destinations of the tower's tokens: `order` sorts this rank's rows by the rank that receives them."""

    order: Tensor
    send: list[int]
    receive: list[int]
    total: int
    """Visual tokens of the entire row."""


def shares(grids: Sequence[Grid], size: int) -> list[Share]:
    """Cut the frames of a row's images and videos (in the tower's order) into `size` runs with about equal patches."""
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
    """Plan the path of each visual token, from the rank whose tower made it to the rank whose slice contains its place.

    `at_N` holds the places in the entire row, in the tower's order; `part` is this rank's slice. All on the CPU.
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
    """Send each level's rows to their slices, in the tower's order; every rank of a group must call this.

    `levels` are the tower's outputs of the same tokens; a blank's rows are not in `order` and stay, with their graph.
    """
    rows_ND = torch.cat(list(levels), dim=1)[plan.order]
    if plan.total:
        rows_ND = exchange(rows_ND, plan.receive, plan.send, group.ranks)
    return list(torch.split(rows_ND, [level.shape[1] for level in levels], dim=1))

"""Samples into packs, packs into steps: pure functions of numbers. No torch.

A pack is one row of the token budget. Attention never crosses samples; positions restart with each:

    tokens    a a a b b c c c c c . .      budget 12, three samples, two of padding
    row 0     0 1 2 0 1 0 1 2 3 4 0 1      text position, restarts (that is what separates them)
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]

_WINDOW = 2048  # samples packed together: a larger window hardly fills better, and its reads are further apart
_FULL = 0.999  # a pack this full is closed at once
_LOOKED_AT = 64  # packs checked for room in patches before the emptiest one is tried
_CARRIED = 32  # emptiest packs that stay open for the next window


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Pack p holds samples `members[starts[p]:starts[p + 1]]`."""

    members: Ints
    starts: Ints

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.starts) - 1

    def sums(self, values: Ints) -> Ints:
        """Return the sum of the samples' values in each pack."""
        running = np.concatenate([[0], np.cumsum(values[self.members])])
        sums: Ints = running[self.starts[1:]] - running[self.starts[:-1]]
        return sums

    def take(self, order: Ints) -> "Packs":
        """Return these packs, in this order."""
        lengths = (self.starts[1:] - self.starts[:-1])[order]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.starts[:-1][order] - starts[:-1], lengths)
        return Packs(members=self.members[np.arange(starts[-1]) + shift], starts=starts)


def best_fit(tokens: Ints, patches: Ints, *, token_budget: int, patch_budget: int) -> Packs:
    """Pack samples in the given order, best-fit decreasing, window by window.

    The packs that a window could not fill stay open for the next one: only the end of the data leaves packs part-empty,
    not every window. Every sample must fit in a pack by itself.
    """
    if int(patches.sum()) * token_budget > int(tokens.sum()) * patch_budget:  # fit by the scarcer of the two
        tokens, patches = patches, tokens
        token_budget, patch_budget = patch_budget, token_budget
    packs: list[list[int]] = []
    closed: list[list[int]] = []
    free_patches: list[int] = []
    open_packs: list[tuple[int, int]] = []  # (free tokens, number of the pack), sorted
    least = max(1, int(token_budget * (1 - _FULL)))
    token_list, patch_list = tokens.tolist(), patches.tolist()
    for first in range(0, len(tokens), _WINDOW):
        window = tokens[first : first + _WINDOW]
        for index in (np.argsort(-window, kind="stable") + first).tolist():
            need, need_patches = token_list[index], patch_list[index]
            at, count = bisect_left(open_packs, (need, -1)), len(open_packs)
            last = min(at + _LOOKED_AT, count - 1)
            while at < last and free_patches[open_packs[at][1]] < need_patches:
                at += 1
            if at == last and free_patches[open_packs[at][1]] < need_patches:
                at = count - 1  # the emptiest pack is the likeliest to have room for the patches
            if at >= count or free_patches[open_packs[at][1]] < need_patches:
                free, number = token_budget, len(packs)
                packs.append([])
                free_patches.append(patch_budget)
            else:
                free, number = open_packs.pop(at)
            packs[number].append(index)
            free_patches[number] -= need_patches
            if free - need >= least:
                insort(open_packs, (free - need, number))
            else:
                closed.append(packs[number])
        while len(open_packs) > _CARRIED:
            closed.append(packs[open_packs.pop(0)[1]])
    closed += [packs[number] for _, number in sorted(open_packs, key=lambda item: item[1])]
    return _flatten(closed)


def _flatten(packs: list[list[int]]) -> Packs:
    lengths = [len(pack) for pack in packs]
    members = np.fromiter((index for pack in packs for index in pack), dtype=np.int64, count=sum(lengths))
    return Packs(members=members, starts=np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))]))


def group_steps(cost: np.ndarray[Any, Any], per_step: int, *, window: int, rng: np.random.Generator) -> Ints:
    """Order packs so that those of a step have similar costs: sort inside windows of `window` steps, shuffle the steps.

    Ranks wait for each other in every micro-batch, so the costliest pack of a step sets its time. Window 0 only
    shuffles.
    """
    order: Ints = rng.permutation(len(cost)).astype(np.int64)
    steps = len(cost) // per_step
    if window == 0 or steps == 0:
        return order
    full, rest = order[: steps * per_step], order[steps * per_step :]
    blocks = []
    for first in range(0, steps, window):
        block = full[first * per_step : (first + window) * per_step]
        block = block[np.argsort(cost[block], kind="stable")].reshape(-1, per_step)
        blocks.append(block[rng.permutation(len(block))].reshape(-1))
    return np.concatenate([*blocks, rest])


def deal(cost: np.ndarray[Any, Any], data_size: int) -> list[list[int]]:
    """Deal the packs of one step to ranks, the costliest first, so that the packs of each slot have similar costs.

    Ranks differ by at most one pack; the stream fills the gap with a dummy. Inside a slot the rank with the smallest
    total so far takes the costliest pack.
    """
    order = np.argsort(-np.asarray(cost), kind="stable").tolist()
    shares: list[list[int]] = [[] for _ in range(data_size)]
    totals = [0.0] * data_size
    for first in range(0, len(order), data_size):
        poorest = sorted(range(data_size), key=lambda rank: (totals[rank], rank))
        for pack, rank in zip(order[first : first + data_size], poorest, strict=False):
            shares[rank].append(pack)
            totals[rank] += float(cost[pack])
    return shares

"""Sends rows to their experts and back: one exchange of counts, then of rows, by functional differentiable collectives.

Suffixes: T tokens, K top-k, D hidden, E experts, L local experts, R received rows, S sources (ranks of the group).
Every function that takes a process group must be called by every rank of it, in the same order.

DeepSpeed's own all-to-all fills a buffer in place. If a recompute policy kept that buffer, a later call would have
overwritten it, and gradients would be silently wrong. Functional collectives return fresh tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.recompute import kept


@dataclass(frozen=True, kw_only=True)
class Route:
    """The destinations of this rank's T*K assignments, and the order of the rows that arrive."""

    top_k: int
    group: dist.ProcessGroup | None
    slots: Tensor
    """[T*K]: row i, in order of global expert, holds assignment slots[i] = token * K + k."""
    rows: Tensor
    """[T*K]: the inverse, the row of each assignment."""
    send: list[int]
    receive: list[int]
    counts_L: Tensor
    """How many of the R rows each local expert receives."""
    by_expert: Tensor | None
    """[R]: which received row comes i-th in expert order; None if the rows arrive in that order (one source)."""
    by_source: Tensor | None


def route(topk_TK: Tensor, *, num_experts: int, group: dist.ProcessGroup | None, ep_size: int) -> Route:
    """Plan the exchange of one layer. With ep_size > 1 this is the only point where the host waits for the device."""
    experts, slots = topk_TK.reshape(-1).sort(stable=True)
    rows = torch.empty_like(slots).scatter_(0, slots, torch.arange(slots.numel(), device=slots.device))
    if ep_size == 1:
        counts_L = _counts(experts, num_experts)
        return Route(
            top_k=topk_TK.shape[1],
            group=None,
            slots=slots,
            rows=rows,
            send=[slots.numel()],
            receive=[slots.numel()],
            counts_L=counts_L,
            by_expert=None,
            by_source=None,
        )

    counts_SL, send, receive = kept("counts", lambda: _exchange_counts(_counts(experts, num_experts), group, ep_size))
    by_expert, by_source = _orders(counts_SL, sum(receive))
    return Route(
        top_k=topk_TK.shape[1],
        group=group,
        slots=slots,
        rows=rows,
        send=send,
        receive=receive,
        counts_L=counts_SL.sum(0),
        by_expert=by_expert,
        by_source=by_source,
    )


def dispatch(x_TD: Tensor, route: Route) -> Tensor:
    """Return x_RD, the rows of this rank's experts, sorted by local expert."""
    x: Tensor = _Expand.apply(x_TD, route.slots, route.rows, route.top_k)  # type: ignore[no-untyped-call]  # torch's stub
    if route.group is None:
        return x
    received = kept("dispatched", lambda: exchange(x, route.receive, route.send, route.group))
    return _permute(received, route.by_expert, route.by_source)


def combine(y_RD: Tensor, scores_TK: Tensor, route: Route) -> Tensor:
    """Return y_TD: each token's expert outputs, sent back to its rank and summed with its scores."""
    y = _permute(y_RD, route.by_source, route.by_expert)
    y = kept("combined", lambda: y if route.group is None else exchange(y, route.send, route.receive, route.group))
    y_TKD = _permute(y, route.rows, route.slots).view(*scores_TK.shape, y.shape[1])
    # one batched product: sums in float32 whatever the dtype, and no [T, K, D] product in memory
    return torch.bmm(scores_TK.to(y.dtype).unsqueeze(1), y_TKD).squeeze(1)


def exchange(x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Exchange rows with uneven splits, all to all; differentiable."""
    assert group is not None
    out = funcol.all_to_all_single_autograd(x.contiguous(), receive, send, group)
    return out.wait() if isinstance(out, funcol.AsyncCollectiveTensor) else out


def _counts(sorted_experts: Tensor, num_experts: int) -> Tensor:
    """Count rows per expert, without atomics and without waiting for the device."""
    bounds = torch.arange(num_experts + 1, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, bounds).diff()


def _exchange_counts(counts_E: Tensor, group: Any, ep_size: int) -> tuple[Tensor, list[int], list[int]]:
    """Return the number of rows per source and local expert, and per rank of rows to send and to receive."""
    counts_SL = exchange(
        counts_E, [counts_E.numel() // ep_size] * ep_size, [counts_E.numel() // ep_size] * ep_size, group
    )
    counts_SL = counts_SL.view(ep_size, -1)
    send, receive = torch.stack([counts_E.view(ep_size, -1).sum(1), counts_SL.sum(1)]).tolist()
    return counts_SL, send, receive


def _orders(counts_SL: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the permutations from (source, expert) order to (expert, source) order, and back; no sort, no sync."""
    sources, experts = counts_SL.shape
    first_SL = _exclusive(counts_SL.reshape(-1)).view(sources, experts)
    first_LS = _exclusive(counts_SL.t().reshape(-1)).view(experts, sources)
    here = torch.arange(rows, device=counts_SL.device)
    to_source = (first_LS.t() - first_SL).reshape(-1).repeat_interleave(counts_SL.reshape(-1), output_size=rows)
    to_expert = (first_SL.t() - first_LS).reshape(-1).repeat_interleave(counts_SL.t().reshape(-1), output_size=rows)
    return here + to_expert, here + to_source


def _exclusive(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _permute(x: Tensor, index: Tensor | None, inverse: Tensor | None) -> Tensor:
    if index is None or inverse is None:
        return x
    permuted: Tensor = _Permute.apply(x, index, inverse)  # type: ignore[no-untyped-call]  # torch's stub
    return permuted


class _Permute(torch.autograd.Function):
    """Puts rows into another order; its gradient is a gather too, where autograd's own would add with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Expand(torch.autograd.Function):
    """Copies one row per assignment, in expert order; the gradient is gathered and summed over K in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, slots: Tensor, rows: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.top_k = top_k
        return x_TD.index_select(0, slots // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows).view(-1, ctx.top_k, grad.shape[1]).sum(1), None, None, None

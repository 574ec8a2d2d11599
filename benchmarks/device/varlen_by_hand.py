"""Compute torch's attention of variable lengths by definition, with the arguments of its kernel and its backward."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.device.cuda_rules import require_varlen


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: Tensor,
    _: Any,
    longest: int,
    __: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: Any = None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention of variable lengths by definition, in the kernel's form."""
    require_varlen(q, k, v, cuts, longest)
    out = torch.empty_like(q)
    for part, chances, _, values in _parts(q, k, v, cuts, is_causal or window == [-1, 0], scale):
        out[part] = (chances @ values).transpose(0, 1)
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cuts: Tensor,
    _: Any,
    longest: int,
    __: int,
    is_causal: bool,
    state: Tensor,
    scale: float | None = None,
    window: Any = None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    copies, factor = q.shape[1] // k.shape[1], q.shape[2] ** -0.5 if scale is None else scale
    for part, chances, keys, values in _parts(q, k, v, cuts, is_causal or window == [-1, 0], scale):
        grad_out = grad[part].transpose(0, 1)
        pull = grad_out @ values.transpose(1, 2)
        scores = chances * (pull - (pull * chances).sum(-1, keepdim=True)) * factor
        grad_q[part] = (scores @ keys).transpose(0, 1)
        for into, gradient in (
            (grad_k, scores.transpose(1, 2) @ q[part].transpose(0, 1)),
            (grad_v, chances.transpose(1, 2) @ grad_out),
        ):
            into[part] = gradient.unflatten(0, (-1, copies)).sum(1).transpose(0, 1)
    return grad_q, grad_k, grad_v


def _parts(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, causal: bool, scale: float | None) -> Any:
    """Yield for each sample its slice, its probabilities by head, and its keys and values repeated per query head."""
    borders, copies = cuts.tolist(), q.shape[1] // k.shape[1]
    for first, last in zip(borders, borders[1:], strict=False):
        part = slice(first, last)
        keys, values = (x[part].transpose(0, 1).repeat_interleave(copies, dim=0) for x in (k, v))
        scores = q[part].transpose(0, 1) @ keys.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones(last - first, last - first, dtype=torch.bool).triu(1), -torch.inf)
        yield part, scores.softmax(-1), keys, values

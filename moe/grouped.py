"""The expert block as one node of the autograd graph: little is kept, and only the gradients asked for are computed.

Suffixes: R routed rows, D hidden, F expert hidden, L local experts, r LoRA rank.

Autograd would keep the SwiGLU's inputs, its product and a transposed view of each weight, and add frozen and low-rank
gradients in fresh tensors. Here a call keeps x, the gate_up output and two thin [R, r] activations; without trained
weights not even x. More rows than a chunk (one rank got most tokens) keep x alone: forward and backward then go chunk
by chunk, and what a chunk needs is computed again, so that memory beyond x and y does not grow with the skew.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.projections import Beside, Chunk, Inside, Plan, Wants, block
from moe.recompute import unread


def grouped_experts(
    x_RD: Tensor, counts_L: Tensor, gate_up: Tensor, down: Tensor, lora: tuple[Tensor, ...], plan: Plan
) -> Tensor:
    """Return y_RD, the unweighted expert outputs of rows that are sorted by local expert.

    lora is () or (gate_up_A [L, r, D], gate_up_B [L, 2F, r], down_A [L, r, F], down_B [L, D, r]).
    """
    offs_L = counts_L.cumsum(0).to(torch.int32)
    result: Tensor = _GroupedExperts.apply(plan, offs_L, x_RD, gate_up, down, *lora)  # type: ignore[no-untyped-call]
    return result


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, offs_L: Tensor, x_RD: Tensor, gate_up: Tensor, down: Tensor, *lora: Tensor
    ) -> Tensor:
        ctx.plan, rows = plan, x_RD.shape[0]
        experts = block(plan, gate_up, down, lora)
        saved: list[Tensor | None] = [None, None, None]
        if 0 < rows <= plan.chunk_rows:
            (chunk,) = _chunks(rows, plan.chunk_rows, offs_L)
            middle = experts.middle(x_RD, chunk)
            saved = [middle.both, middle.thin_x, middle.thin_h]
            y_RD = unread("down", lambda: experts.end(middle, chunk), lambda: torch.empty_like(x_RD))
        else:
            y_RD = unread("down", lambda: _by_chunks(experts, x_RD, plan, offs_L), lambda: torch.empty_like(x_RD))
        needs_x = bool(lora) or ctx.needs_input_grad[3] or saved[0] is None
        ctx.save_for_backward(offs_L, x_RD if needs_x else None, *saved, gate_up, down, *lora)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        offs_L, x_RD, both, thin_x, thin_h, *weights = ctx.saved_tensors
        _, _, *wanted = ctx.needs_input_grad
        wants = Wants(rows=wanted[0], gate_up=wanted[1], down=wanted[2])
        grad_RD = grad_RD.contiguous()  # grouped_mm refuses the stride 0 of an expanded gradient
        rows, chunk_rows = grad_RD.shape[0], ctx.plan.chunk_rows
        experts = block(ctx.plan, weights[0], weights[1], weights[2:])
        if both is not None:
            (chunk,) = _chunks(rows, chunk_rows, offs_L)
            thins = () if thin_x is None else (thin_x, thin_h)
            found = experts.backward(grad_RD, x_RD, both, thins, chunk, wants)
            return None, None, found.rows, *_finished(found.weights, weights, wanted[1:])
        grad_x_RD = torch.empty_like(grad_RD) if wants.rows else None
        totals: list[Tensor | None] = [None] * len(weights)
        for chunk in _chunks(rows, chunk_rows, offs_L):
            x = x_RD[chunk.rows]
            middle = experts.middle(x, chunk)
            thins = () if middle.thin_x is None else (middle.thin_x, middle.thin_h)
            found = experts.backward(grad_RD[chunk.rows], x, middle.both, thins, chunk, wants)
            if grad_x_RD is not None:
                grad_x_RD[chunk.rows] = found.rows
            _add(totals, found.weights)
        return None, None, grad_x_RD, *_finished(totals, weights, wanted[1:])


def _chunks(rows: int, chunk_rows: int, offs_L: Tensor) -> Iterator[Chunk]:
    whole = rows <= chunk_rows
    for index, start in enumerate(range(0, rows, chunk_rows)):
        stop = min(start + chunk_rows, rows)
        offs = offs_L if whole else (offs_L - start).clamp_(0, stop - start)
        yield Chunk(index=index, rows=slice(start, stop), offs=offs, whole=whole)


def _by_chunks(experts: Beside | Inside, x_RD: Tensor, plan: Plan, offs_L: Tensor) -> Tensor:
    """Return y_RD, one chunk after another."""
    y_RD = torch.empty_like(x_RD)
    for chunk in _chunks(x_RD.shape[0], plan.chunk_rows, offs_L):
        y_RD[chunk.rows] = experts.end(experts.middle(x_RD[chunk.rows], chunk), chunk)
    return y_RD


def _add(totals: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add one of several chunks' gradients, in float32: an expert may have rows in all of them."""
    for index, grad in enumerate(grads):
        total = totals[index]
        if grad is not None:
            totals[index] = grad.float() if total is None else total.add_(grad)


def _finished(
    totals: Sequence[Tensor | None], weights: Sequence[Tensor], wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """Yield the wanted gradients; zeros where no row came by, or this rank's graph would differ from the others'."""
    for total, weight, want in zip(totals, weights, wanted, strict=True):
        if not want:
            yield None
        else:
            yield torch.zeros_like(weight) if total is None else total.to(weight.dtype).contiguous()

"""SwiGLU experts over rows sorted by expert: grouped GEMMs, LoRA beside the weights, and a backward that saves little.

Suffixes: R routed rows, D hidden, F expert hidden, L local experts, r LoRA rank.

Why a hand-written backward: autograd would keep the SwiGLU's inputs, its product and a transposed view of each weight,
and would add frozen and low-rank gradients in fresh tensors. Here a call keeps x, the gate_up output and two thin
[R, r] activations, and computes exactly the gradients that are asked for. The outputs of the *wide* GEMMs are never
written in place, so a recompute may keep them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.recompute import kept, unread


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one call computes: the LoRA scale, its dropout, and the number of rows worked on at a time."""

    scale: float
    dropout: float
    dropout_seed: int
    chunk_rows: int


def grouped_experts(
    x_RD: Tensor, counts_L: Tensor, gate_up: Tensor, down: Tensor, lora: tuple[Tensor, ...], plan: Plan
) -> Tensor:
    """Return y_RD, the unweighted expert outputs of rows that are sorted by local expert.

    lora is () or (gate_up_A [L, r, D], gate_up_B [L, 2F, r], down_A [L, r, F], down_B [L, D, r]).
    More rows than plan.chunk_rows are computed chunk by chunk, and once more in backward instead of being kept.
    """
    offs_L = counts_L.cumsum(0).to(torch.int32)
    result: Tensor = _GroupedExperts.apply(plan, offs_L, x_RD, gate_up, down, *lora)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Rows start..stop, and where each expert's part of them ends (counted from start)."""

    index: int
    start: int
    stop: int
    offs: Tensor
    whole: bool


def _chunks(rows: int, chunk_rows: int, offs_L: Tensor) -> Iterator[_Chunk]:
    for index, start in enumerate(range(0, rows, chunk_rows)):
        stop = min(start + chunk_rows, rows)
        whole = stop - start == rows
        offs = offs_L if whole else (offs_L - start).clamp_(0, stop - start)
        yield _Chunk(index=index, start=start, stop=stop, offs=offs, whole=whole)


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """A weight [L, out, in] and, beside it, either no factors or A [L, r, in] and B [L, out, r]."""

    side: int
    plan: Plan
    weight: Tensor
    factors: tuple[Tensor, ...]

    def forward(self, x: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor | None]:
        """Return x W^T + s (x A^T) B^T per expert, and the thin s x A^T that the gradient of B needs."""
        wide = self._wide(x, chunk)
        if not self.factors:
            return wide, None
        thin = self.thin(x, chunk)
        assert thin is not None
        return F.grouped_mm(thin, self.factors[1].transpose(1, 2), offs=chunk.offs).add_(wide), thin

    def _wide(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """Return x W^T, or what a recompute kept of it; rows that come in chunks are too many to keep."""

        def compute() -> Tensor:
            return F.grouped_mm(x, self.weight.transpose(1, 2), offs=chunk.offs)

        if not chunk.whole:
            return compute()
        if self.side == 0:
            return kept("gate_up", compute)
        return unread("down", compute, lambda: x.new_empty(x.shape[0], self.weight.shape[1]))

    def thin(self, x: Tensor, chunk: _Chunk) -> Tensor | None:
        """Return s x A^T."""
        if not self.factors:
            return None
        a = self.factors[0].transpose(1, 2)
        return F.grouped_mm(self._dropped(x, chunk), a, offs=chunk.offs).mul_(self.plan.scale)

    def rows_backward(self, grad: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of x, and the thin one that the gradient of A needs."""
        grad_thin = self.thin_backward(grad, chunk)
        wide = F.grouped_mm(grad, self.weight, offs=chunk.offs)
        if grad_thin is None:
            return wide, None
        grad_x = self._dropped(F.grouped_mm(grad_thin, self.factors[0], offs=chunk.offs), chunk)
        return grad_x.add_(wide), grad_thin

    def thin_backward(self, grad: Tensor, chunk: _Chunk) -> Tensor | None:
        """Return the gradient of x A^T."""
        if not self.factors:
            return None
        return F.grouped_mm(grad, self.factors[1], offs=chunk.offs).mul_(self.plan.scale)

    def factors_backward(
        self, grad: Tensor, grad_thin: Tensor | None, x: Tensor | None, thin: Tensor | None, chunk: _Chunk
    ) -> list[Tensor]:
        """Return the gradients of A and B."""
        if grad_thin is None or thin is None or x is None:
            return []
        # [r, out] and transposed after: the other order is a GEMM with r columns, several times slower on CPU
        grad_b = _outer(thin, grad, chunk.offs).transpose(1, 2)
        return [_outer(grad_thin, self._dropped(x, chunk), chunk.offs), grad_b]

    def _dropped(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """Apply the dropout mask: the same in forward, backward and recompute, made anew, never kept."""
        if self.plan.dropout == 0.0:
            return x
        keep = 1.0 - self.plan.dropout
        generator = torch.Generator(x.device).manual_seed(self.plan.dropout_seed + 2 * chunk.index + self.side)
        return torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep).mul_(x)


def _outer(g_RY: Tensor, x_RX: Tensor, offs: Tensor) -> Tensor:
    """Return g^T x per expert [L, Y, X], the gradient of a weight; zeros where an expert has no rows."""
    return F.grouped_mm(g_RY.t(), x_RX, offs=offs)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of gate_up, and the product again."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(grad, silu, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grad_gate_up, silu.mul_(up)


class _GroupedExperts(torch.autograd.Function):
    """The whole expert block as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, offs_L: Tensor, x_RD: Tensor, gate_up: Tensor, down: Tensor, *lora: Tensor
    ) -> Tensor:
        ctx.plan = plan
        rows = x_RD.shape[0]
        up, out = _projections(plan, gate_up, down, lora)
        y_RD = None if 0 < rows <= plan.chunk_rows else torch.empty_like(x_RD)
        kept: list[Tensor | None] = [None, None, None]
        for chunk in _chunks(rows, plan.chunk_rows, offs_L):
            both, thin_x = up.forward(x_RD[chunk.start : chunk.stop], chunk)
            y, thin_h = out.forward(_swiglu(both), chunk)
            if y_RD is None:
                y_RD, kept = y, [both, thin_x, thin_h]
            else:
                y_RD[chunk.start : chunk.stop] = y
        assert y_RD is not None
        # gate_up's output is kept while it is bounded; with more rows, x is kept and the rest computed again
        needs_x = bool(lora) or ctx.needs_input_grad[3] or kept[0] is None
        ctx.save_for_backward(offs_L, x_RD if needs_x else None, *kept, gate_up, down, *lora)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        offs_L, x_RD, both, thin_x, thin_h, *weights = ctx.saved_tensors
        _, _, wants_x, *wants = ctx.needs_input_grad
        rows, chunk_rows = grad_RD.shape[0], ctx.plan.chunk_rows
        up, out = _projections(ctx.plan, weights[0], weights[1], weights[2:])
        grad_RD = grad_RD.contiguous()  # grouped_mm refuses the stride 0 of an expanded gradient
        grad_x_RD = torch.empty_like(grad_RD) if wants_x and not 0 < rows <= chunk_rows else None
        totals: list[Tensor | None] = [None] * len(wants)
        for chunk in _chunks(rows, chunk_rows, offs_L):
            x = None if x_RD is None else x_RD[chunk.start : chunk.stop]
            kept = (both, thin_x, thin_h)
            if both is None:
                assert x is not None
                both_again, thin_x_again = up.forward(x, chunk)
                kept = (both_again, thin_x_again, None)
            grad_x, grads = _chunk_backward(
                up, out, grad_RD[chunk.start : chunk.stop], x, kept, chunk, ctx.needs_input_grad
            )
            if grad_x_RD is not None and grad_x is not None:
                grad_x_RD[chunk.start : chunk.stop] = grad_x
            elif wants_x:
                grad_x_RD = grad_x
            _accumulate(totals, grads, several=rows > chunk_rows)
        return None, None, grad_x_RD, *_finished(totals, weights, wants)


def _chunk_backward(
    up: _Projection,
    out: _Projection,
    grad: Tensor,
    x: Tensor | None,
    kept: tuple[Tensor, Tensor | None, Tensor | None],
    chunk: _Chunk,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of this chunk's x and of (gate_up, down, *factors)."""
    both, thin_x, thin_h = kept
    _, _, wants_x, wants_up, wants_out, *_ = needs
    grad_h, grad_thin_h = out.rows_backward(grad, chunk)
    grad_both, h = _swiglu_backward(grad_h, both)
    del grad_h
    if thin_h is None:
        thin_h = out.thin(h, chunk)
    grads_out = out.factors_backward(grad, grad_thin_h, h, thin_h, chunk)
    grad_out = _outer(grad, h, chunk.offs) if wants_out else None
    del h
    if wants_x:
        grad_x, grad_thin_x = up.rows_backward(grad_both, chunk)
    else:
        grad_x, grad_thin_x = None, up.thin_backward(grad_both, chunk)
    grads_up = up.factors_backward(grad_both, grad_thin_x, x, thin_x, chunk)
    grad_up = None
    if wants_up:
        assert x is not None
        grad_up = _outer(grad_both, x, chunk.offs)
    return grad_x, [grad_up, grad_out, *grads_up, *grads_out]


def _accumulate(totals: list[Tensor | None], grads: list[Tensor | None], *, several: bool) -> None:
    """Add one chunk's gradients, in float32 when there are more chunks to come."""
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        total = totals[index]
        if total is not None:
            total.add_(grad)
        else:
            totals[index] = grad.float() if several else grad


def _finished(totals: list[Tensor | None], weights: Sequence[Tensor], wants: Sequence[bool]) -> Iterator[Tensor | None]:
    """Yield each wanted gradient as its weight's dtype; zeros where no row came by, so that no rank's graph differs."""
    for total, weight, wanted in zip(totals, weights, wants, strict=True):
        if not wanted:
            yield None
        else:
            yield torch.zeros_like(weight) if total is None else total.to(weight.dtype).contiguous()


def _projections(plan: Plan, gate_up: Tensor, down: Tensor, lora: Sequence[Tensor]) -> tuple[_Projection, _Projection]:
    return (
        _Projection(side=0, plan=plan, weight=gate_up, factors=tuple(lora[:2])),
        _Projection(side=1, plan=plan, weight=down, factors=tuple(lora[2:])),
    )

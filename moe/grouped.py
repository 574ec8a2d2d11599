"""The expert block as one node of the autograd graph, which keeps little and computes only the gradients it needs.

Suffixes: R routed rows, D hidden, F expert hidden, L local experts, r LoRA rank.

Autograd would keep the SwiGLU's inputs, its product and a transposed view of each weight, and add frozen and low-rank
gradients in fresh tensors. Here a call keeps x, the gate_up output and two thin [R, r] activations; if all weights are
frozen, it does not keep x either.

A rank with popular experts receives many times its share of rows. So intermediates are computed for one chunk of rows
at a time. With still more rows only x is kept, and backward computes each chunk's gate_up output again: memory beyond
x and y stops growing with the imbalance.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.projections import CallOptions, Chunk, Middle, PackedLora, SeparateLora, Wants, block
from moe.recompute import unread


def grouped_experts(
    x_RD: Tensor, counts_L: Tensor, gate_up: Tensor, down: Tensor, lora: tuple[Tensor, ...], options: CallOptions
) -> Tensor:
    """Return y_RD, the unweighted expert outputs of rows that are sorted by local expert.

    lora is () or (gate_up_A [L, r, D], gate_up_B [L, 2F, r], down_A [L, r, F], down_B [L, D, r]).
    """
    offs_L = counts_L.cumsum(0).to(torch.int32)
    result: Tensor = _GroupedExperts.apply(options, offs_L, x_RD, gate_up, down, *lora)  # type: ignore[no-untyped-call]
    return result


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: CallOptions, offs_L: Tensor, x_RD: Tensor, gate_up: Tensor, down: Tensor, *lora: Tensor
    ) -> Tensor:
        ctx.options, rows = options, x_RD.shape[0]
        experts = block(options, gate_up, down, lora, x_RD)
        saved: tuple[Tensor | None, ...] = (None, None, None)
        if 0 < rows <= options.keep_rows:
            y_RD, saved = _forward(experts, x_RD, options, offs_L, lora)
        else:
            y_RD = unread(
                "down", lambda: _forward_by_chunks(experts, x_RD, options, offs_L), lambda: torch.empty_like(x_RD)
            )
        needs_x = bool(lora) or ctx.needs_input_grad[3] or saved[0] is None
        ctx.save_for_backward(offs_L, x_RD if needs_x else None, *saved)
        ctx.weights = gate_up, down, *lora  # not saved for backward: each saved tensor costs a recompute host time
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        offs_L, x_RD, both_R, thin_x_R, thin_h_R = ctx.saved_tensors
        weights = ctx.weights
        _, _, *needed = ctx.needs_input_grad
        wants = Wants(rows=needed[0], gate_up=needed[1], down=needed[2])
        grad_RD = grad_RD.contiguous()  # grouped_mm refuses the stride 0 of an expanded gradient
        experts = block(ctx.options, weights[0], weights[1], weights[2:], grad_RD)
        several = grad_RD.shape[0] > ctx.options.chunk_rows
        grad_x_RD = torch.empty_like(grad_RD) if wants.rows and (several or not len(grad_RD)) else None
        totals: list[Tensor | None] = [None] * len(weights)
        for chunk in _chunks(grad_RD.shape[0], ctx.options, offs_L):
            x = None if x_RD is None else x_RD[chunk.rows]
            if both_R is None:
                assert x is not None
                middle = experts.middle(x, chunk)
                both, thins = middle.both, (middle.thin_x, middle.thin_h)
                del middle
            else:
                both = both_R[chunk.rows]
                thins = (None, None) if thin_x_R is None else (thin_x_R[chunk.rows], thin_h_R[chunk.rows])
            gradients = experts.backward(grad_RD[chunk.rows], x, both, thins, chunk, wants)
            if grad_x_RD is None:
                grad_x_RD = gradients.rows
            elif gradients.rows is not None:
                grad_x_RD[chunk.rows] = gradients.rows
            _add(totals, gradients.weights, several=several)
        return None, None, grad_x_RD, *_finished(totals, weights, needed[1:])


def _chunks(rows: int, options: CallOptions, offs_L: Tensor) -> Iterator[Chunk]:
    for index, start in enumerate(range(0, rows, options.chunk_rows)):
        stop = min(start + options.chunk_rows, rows)
        offs = offs_L if stop - start == rows else (offs_L - start).clamp_(0, stop - start)
        yield Chunk(index=index, rows=slice(start, stop), offs=offs, keep=rows <= options.keep_rows)


def _forward(
    experts: SeparateLora | PackedLora, x_RD: Tensor, options: CallOptions, offs_L: Tensor, lora: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return y_RD and what backward needs: the gate_up output and the thin activations."""
    if x_RD.shape[0] <= options.chunk_rows:
        (chunk,) = _chunks(x_RD.shape[0], options, offs_L)
        middle = experts.middle(x_RD, chunk)
        return _end(experts, middle, chunk, x_RD), (middle.both, middle.thin_x, middle.thin_h)
    y_RD, both_R = torch.empty_like(x_RD), x_RD.new_empty(x_RD.shape[0], options.two_f)
    thins_R: list[Tensor | None] = [None, None]
    if lora:
        thins_R = [x_RD.new_empty(x_RD.shape[0], a.shape[1]) for a in lora[::2]]
    for chunk in _chunks(x_RD.shape[0], options, offs_L):
        x = x_RD[chunk.rows]
        middle = experts.middle(x, chunk, into=both_R[chunk.rows])
        for thin_R, thin in zip(thins_R, (middle.thin_x, middle.thin_h), strict=True):
            if thin_R is not None and thin is not None:
                thin_R[chunk.rows] = thin
        y_RD[chunk.rows] = _end(experts, middle, chunk, x)
    return y_RD, (both_R, *thins_R)


def _end(experts: SeparateLora | PackedLora, middle: Middle, chunk: Chunk, x: Tensor) -> Tensor:
    """Return y, or an uninitialised tensor of its shape in a second pass that does not read it."""
    return unread("down", lambda: experts.end(middle, chunk), lambda: torch.empty_like(x))


def _forward_by_chunks(
    experts: SeparateLora | PackedLora, x_RD: Tensor, options: CallOptions, offs_L: Tensor
) -> Tensor:
    """Return y_RD and keep nothing."""
    y_RD = torch.empty_like(x_RD)
    for chunk in _chunks(x_RD.shape[0], options, offs_L):
        y_RD[chunk.rows] = experts.end(experts.middle(x_RD[chunk.rows], chunk), chunk)
    return y_RD


def _add(totals: list[Tensor | None], grads: Sequence[Tensor | None], *, several: bool) -> None:
    """Add a chunk's gradients; in float32 if there are several chunks, as an expert may have rows in each of them."""
    for index, grad in enumerate(grads):
        total = totals[index]
        if total is not None and grad is not None:
            total.add_(grad)
        elif grad is not None:
            totals[index] = grad.float() if several else grad


def _finished(
    totals: Sequence[Tensor | None], weights: Sequence[Tensor], needed: Sequence[bool]
) -> Iterator[Tensor | None]:
    """Yield the needed gradients; zeros without any row, so that the graph is the same on all ranks."""
    for total, weight, is_needed in zip(totals, weights, needed, strict=True):
        if not is_needed:
            yield None
        else:
            yield torch.zeros_like(weight) if total is None else total.to(weight.dtype).contiguous()

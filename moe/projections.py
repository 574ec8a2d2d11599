"""The arithmetic of one expert block on rows sorted by expert: two projections with SwiGLU between them, and LoRA.

Suffixes: R routed rows, D hidden, F expert hidden, L local experts, r LoRA rank. `both` [R, 2F] has the gate first.

Two classes compute the same. `SeparateLora` works on any weights: each low-rank part is a thin GEMM into a tensor as
wide as the frozen one's, then an addition. `PackedLora` needs weights with room for r more rows (gate_up) or columns
(down), which it fills with A and B: then one GEMM gives gate_up x and A x, one gives down h + B (A h), and backward
saves the same passes over [R, D] tensors. Those passes, not the multiplications, are the cost of LoRA on experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.linear import Workspace
from moe.kernels.packed import Packing
from moe.recompute import kept


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """Options of one call."""

    scale: float
    """The factor of the low-rank part, divided by the share that dropout keeps: 1 / 0.9 in bfloat16 would be 1.109."""
    dropout: float
    dropout_seed: int
    inside: bool
    """Whether gate_up is [L, 2F + r, D] and down [L, D, F + r], with room for A and B."""
    chunk_rows: int
    """How many rows are computed at a time."""
    keep_rows: int
    """With more rows than this, backward computes the gate_up output again instead of keeping it."""
    two_f: int
    """The width of the gate_up output."""
    packings: Mapping[str, Packing]
    """How gate_up and down are packed; empty if they are as they are computed with."""
    workspace: Workspace
    """The memory in which packed weights are unpacked."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some of the rows, and where each expert's rows end (counted from the chunk's first row)."""

    index: int
    rows: slice
    offs: Tensor
    keep: bool
    """Whether a recompute may keep the gate_up output; it may not if there are too many rows."""


@dataclass(frozen=True, kw_only=True)
class Middle:
    """The tensors between the projections: outputs of gate_up and SwiGLU, and the thin activations s A x and s A h."""

    both: Tensor
    thin_x: Tensor | None
    h: Tensor
    thin_h: Tensor | None


Thins = tuple[Tensor | None, Tensor | None]
"""s A x and s A h with LoRA, else None."""


@dataclass(frozen=True, kw_only=True)
class Wants:
    """Gradients that backward must return; it always returns those of the LoRA factors."""

    rows: bool
    gate_up: bool
    down: bool


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradient of a chunk's rows, and those of gate_up, down and the factors, in the order of the arguments."""

    rows: Tensor | None
    weights: list[Tensor | None]


class Stacks:
    """The weights of a call, unpacked when they are first used: a second pass may need neither of them."""

    def __init__(self, options: CallOptions, gate_up: Tensor, down: Tensor, lora: Sequence[Tensor], x: Tensor) -> None:
        self.options, self.lora = options, tuple(lora)
        self._given = {"gate_up": gate_up, "down": down}
        self._like = x

    @cached_property
    def gate_up(self) -> Tensor:
        """Return gate_up [L, 2F, D]."""
        return self._whole("gate_up")

    @cached_property
    def down(self) -> Tensor:
        """Return down [L, D, F]."""
        return self._whole("down")

    def _whole(self, key: str, *, more_rows: int = 0, more_columns: int = 0) -> Tensor:
        given, packing = self._given[key], self.options.packings.get(key)
        if packing is None:
            return given
        shape = (len(given), packing.out + more_rows, packing.into + more_columns)
        whole = self.options.workspace.take(key, shape, self._like)
        packing.unpack(given, whole[:, : packing.out, : packing.into])
        return whole


class SeparateLora(Stacks):
    """Low-rank parts computed separately from the frozen ones, or no LoRA at all; weights may train."""

    def middle(self, x: Tensor, chunk: Chunk, into: Tensor | None = None) -> Middle:
        """Compute up to the SwiGLU; the gate_up output goes `into` a given tensor."""
        both = _kept_gate_up(x, self, chunk)
        if not self.lora:
            both = both if into is None else into.copy_(both)
            return Middle(both=both, thin_x=None, h=_swiglu(both), thin_h=None)
        thin_x = _out(self._dropped(x, chunk, 0), self.lora[0], chunk).mul_(self.options.scale)
        both = _sum(_out(thin_x, self.lora[1], chunk), both, into)
        h = _swiglu(both)
        return Middle(both=both, thin_x=thin_x, h=h, thin_h=self.thin_h(h, chunk))

    def thin_h(self, h: Tensor, chunk: Chunk) -> Tensor:
        """Return s A h."""
        return _out(self._dropped(h, chunk, 1), self.lora[2], chunk).mul_(self.options.scale)

    def end(self, middle: Middle, chunk: Chunk) -> Tensor:
        """Return y."""
        y = _out(middle.h, self.down, chunk)
        return y if middle.thin_h is None else _out(middle.thin_h, self.lora[3], chunk).add_(y)

    def backward(
        self, grad: Tensor, x: Tensor | None, both: Tensor, thins: Thins, chunk: Chunk, wants: Wants
    ) -> Gradients:
        """Return the requested gradients."""
        grad_h, grad_thin_h = _in(grad, self.down, chunk), None
        if self.lora:
            _, up_b, down_a, down_b = self.lora
            grad_thin_h = _in(grad, down_b, chunk).mul_(self.options.scale)
            grad_h = self._dropped(_in(grad_thin_h, down_a, chunk), chunk, 1).add_(grad_h)
        grad_both = torch.empty_like(both)
        h = _swiglu_backward(grad_h, both, grad_both)
        del grad_h
        grad_down = _outer(grad, h, chunk) if wants.down else None
        grad_gate_up = _outer(grad_both, _needed(x), chunk) if wants.gate_up else None
        grads = [grad_gate_up, grad_down]
        grad_x, grad_thin_x = None, None
        if grad_thin_h is not None:
            grad_thin_x = _in(grad_both, up_b, chunk).mul_(self.options.scale)
            dropped_x, dropped_h = self._dropped(_needed(x), chunk, 0), self._dropped(h, chunk, 1)
            grads += _factor_gradients(
                (dropped_x, dropped_h), (grad_both, grad), thins, (grad_thin_x, grad_thin_h), chunk
            )
        del h
        if wants.rows:
            grad_x = _in(grad_both, self.gate_up, chunk)
            if grad_thin_x is not None:
                grad_x = self._dropped(_in(grad_thin_x, self.lora[0], chunk), chunk, 0).add_(grad_x)
        return Gradients(rows=grad_x, weights=grads)

    def _dropped(self, x: Tensor, chunk: Chunk, side: int) -> Tensor:
        """Apply the dropout mask of one projection, which is drawn again in backward and recompute, never kept.

        The remaining values are not scaled up here but by `CallOptions.scale`, a number of full precision.
        """
        if self.options.dropout == 0.0:
            return x
        keep = 1.0 - self.options.dropout
        generator = torch.Generator(x.device).manual_seed(self.options.dropout_seed + 2 * chunk.index + side)
        return torch.empty_like(x).bernoulli_(keep, generator=generator).mul_(x)


class PackedLora(Stacks):
    """LoRA in the spare rows and columns of frozen weights; without dropout, which would apply to A x but not W x."""

    def __init__(self, options: CallOptions, gate_up: Tensor, down: Tensor, lora: Sequence[Tensor], x: Tensor) -> None:
        super().__init__(options, gate_up, down, lora, x)
        self.two_f, self.f = options.two_f, options.two_f // 2

    # The factors are copied at each use, because they change with every optimizer step; through .data, because autograd
    # would see a change of a saved tensor. It copies a few megabytes.

    @cached_property
    def gate_up(self) -> Tensor:
        """Return gate_up [L, 2F + r, D], with A in its last rows."""
        whole = self._whole("gate_up", more_rows=self.lora[0].shape[1])
        whole.data[:, self.two_f :].copy_(self.lora[0])
        return whole

    @cached_property
    def down(self) -> Tensor:
        """Return down [L, D, F + r], with B in its last columns."""
        whole = self._whole("down", more_columns=self.lora[3].shape[2])
        whole.data[:, :, self.f :].copy_(self.lora[3])
        return whole

    def middle(self, x: Tensor, chunk: Chunk, into: Tensor | None = None) -> Middle:
        """Compute up to the SwiGLU; h has its thin activation in the last r columns."""
        wide = _kept_gate_up(x, self, chunk)
        thin_x = wide[:, self.two_f :] * self.options.scale
        both = _sum(_out(thin_x, self.lora[1], chunk), wide[:, : self.two_f], into)
        del wide
        h = x.new_empty(x.shape[0], self.f + thin_x.shape[1])
        torch.mul(F.silu(both[:, : self.f]), both[:, self.f :], out=h[:, : self.f])
        thin_h = self.thin_h(h[:, : self.f], chunk)
        h[:, self.f :] = thin_h
        return Middle(both=both, thin_x=thin_x, h=h, thin_h=thin_h)

    def thin_h(self, h: Tensor, chunk: Chunk) -> Tensor:
        """Return s A h."""
        return _out(h, self.lora[2], chunk).mul_(self.options.scale)

    def end(self, middle: Middle, chunk: Chunk) -> Tensor:
        """Return y."""
        return _out(middle.h, self.down, chunk)

    def backward(
        self, grad: Tensor, x: Tensor | None, both: Tensor, thins: Thins, chunk: Chunk, wants: Wants
    ) -> Gradients:
        """Return the requested gradients."""
        _, up_b, down_a, _ = self.lora
        wide = _in(grad, self.down, chunk)
        grad_thin_h = wide[:, self.f :] * self.options.scale
        grad_h = _in(grad_thin_h, down_a, chunk).add_(wide[:, : self.f])
        del wide
        wide = both.new_empty(both.shape[0], self.two_f + grad_thin_h.shape[1])
        grad_both = wide[:, : self.two_f]
        h = _swiglu_backward(grad_h, both, grad_both)
        del grad_h
        grad_thin_x = _in(grad_both, up_b, chunk).mul_(self.options.scale)
        grads = _factor_gradients((_needed(x), h), (grad_both, grad), thins, (grad_thin_x, grad_thin_h), chunk)
        del h
        grad_x = None
        if wants.rows:
            wide[:, self.two_f :] = grad_thin_x
            grad_x = _in(wide, self.gate_up, chunk)
        return Gradients(rows=grad_x, weights=[None, None, *grads])


def block(
    options: CallOptions, gate_up: Tensor, down: Tensor, lora: Sequence[Tensor], x: Tensor
) -> SeparateLora | PackedLora:
    """Return the block for these weights, which computes in the type of x."""
    return (PackedLora if options.inside else SeparateLora)(options, gate_up, down, lora, x)


def clear_empty(grad: Tensor, offs: Tensor) -> Tensor:
    """Zero the weight gradients [L, ...] of experts without rows, in place."""
    empty = offs.diff(prepend=offs.new_zeros(1)) == 0
    return grad.masked_fill_(empty[:, None, None], 0)


def _kept_gate_up(x: Tensor, stacks: Stacks, chunk: Chunk) -> Tensor:
    """Return the output of the wide GEMM before SwiGLU, or the one that a recompute kept. Never write into it."""
    if chunk.keep:
        return kept("gate_up", lambda: _out(x, stacks.gate_up, chunk))
    return _out(x, stacks.gate_up, chunk)


def _sum(mine: Tensor, wide: Tensor, into: Tensor | None) -> Tensor:
    return mine.add_(wide) if into is None else torch.add(mine, wide, out=into)


def _out(x: Tensor, weight: Tensor, chunk: Chunk) -> Tensor:
    """Return x W^T per expert."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=chunk.offs)


def _in(grad: Tensor, weight: Tensor, chunk: Chunk) -> Tensor:
    """Return g W per expert, the gradient of W's input."""
    return F.grouped_mm(grad, weight, offs=chunk.offs)


def _outer(grad: Tensor, x: Tensor, chunk: Chunk) -> Tensor:
    """Return g^T x per expert, the gradient of its weight; zeros for an expert without rows."""
    weight_grad = F.grouped_mm(grad.t(), x, offs=chunk.offs)
    # the CPU writes those zeros; on some devices CUDA kernels leave uninitialised memory (pytorch issue 172439)
    return weight_grad if weight_grad.is_cpu else clear_empty(weight_grad, chunk.offs)


def _factor_gradients(
    inputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    thins: Thins,
    grad_thins: tuple[Tensor, Tensor],
    chunk: Chunk,
) -> list[Tensor | None]:
    """Return the gradients of A and B of gate_up, then of A and B of down."""
    gradients: list[Tensor | None] = []
    for x, grad, thin, grad_thin in zip(inputs, grads, thins, grad_thins, strict=True):
        # B is computed as [r, out], then transposed: the other order is a GEMM with r columns, far slower on CPU
        gradients += [_outer(grad_thin, x, chunk), _outer(_needed(thin), grad, chunk).transpose(1, 2)]
    return gradients


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, both: Tensor, grad_both: Tensor) -> Tensor:
    """Fill the gradient of the SwiGLU's input, and return its output again."""
    gate, up = both.chunk(2, dim=-1)
    grad_gate, grad_up = grad_both.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(grad, silu, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return silu.mul_(up)


def _needed(x: Tensor | None) -> Tensor:
    assert x is not None
    return x

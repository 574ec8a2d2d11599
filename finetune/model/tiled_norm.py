"""RMS norms that keep little and cast only some tokens to float32 at a time; they compute the same as transformers'.

transformers casts all tokens to float32 and keeps several such copies for backward. Rows are independent, so here one
tile of tokens is cast at a time, and only the input and one float32 per token are kept.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def tile_norms(model: Any, tokens: int) -> int:
    """Let the decoder's norms over the hidden size work in tiles of `tokens` tokens; return the number of norms."""
    inner = getattr(model.model, "language_model", model.model)
    norms = [inner.norm, *(norm for layer in inner.layers for norm in (layer.input_layernorm, _second(layer)))]
    for norm in norms:
        norm.__class__ = TiledNorm  # the same module: its weight and its name stay
        norm.tile_tokens = tokens
    return len(norms)


def _second(layer: Any) -> nn.Module:
    norm: nn.Module = layer.post_attention_layernorm
    return norm


class TiledNorm(nn.Module):
    """transformers' RMS norm over the last dim, in tiles of tokens."""

    weight: Tensor
    variance_epsilon: float
    tile_tokens: int

    def forward(self, hidden: Tensor) -> Tensor:
        """Return weight * hidden / root mean square, token by token."""
        rows_TD = hidden.reshape(-1, hidden.shape[-1])
        out: Tensor = _TiledNorm.apply(rows_TD, self.weight, self.variance_epsilon, self.tile_tokens)  # type: ignore[no-untyped-call]  # torch's own
        return out.view(hidden.shape)


class _TiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, epsilon: float, tokens: int) -> Tensor:
        y_TD = torch.empty_like(x_TD, dtype=torch.promote_types(weight_D.dtype, x_TD.dtype))
        scale_T1 = x_TD.new_empty(len(x_TD), 1, dtype=torch.float32)
        for x, y, scale in zip(*(torch.split(part, tokens) for part in (x_TD, y_TD, scale_T1)), strict=True):
            wide = x.float()
            scale.copy_(torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon))
            y.copy_(weight_D * (wide * scale).to(x.dtype))
        ctx.tokens = tokens
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        grad_x_TD = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        grad_w_D = torch.zeros_like(weight_D, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for first in range(0, len(x_TD), ctx.tokens):
            tile = slice(first, first + ctx.tokens)
            grad, scale = grad_TD[tile].float(), scale_T1[tile]
            normal = x_TD[tile].float() * scale
            if grad_w_D is not None:
                grad_w_D += (grad * normal.to(x_TD.dtype)).sum(0)
            if grad_x_TD is not None:
                grad = grad * weight_D
                grad_x_TD[tile] = scale * (grad - normal * (grad * normal).mean(-1, keepdim=True))
        return grad_x_TD, None if grad_w_D is None else grad_w_D.to(weight_D.dtype), None, None

"""The small operations around a decoder layer's kernels, joined: each group of them is one node of the graph.

transformers' norms and rotary positions, and PEFT's LoRA, are chains of small operations, and autograd keeps the inputs
of each. Calling an operation, saving a tensor and finding it again under recompute costs host time, and with short rows
the device waits for the host. Here a node keeps its input and little else. Results and gradients equal those of the
chains bit for bit: the operations and their order are the same, without those that change nothing. So a node takes an
input twice where a chain has two gradients for it, because autograd adds these up one by one.

A node does not save weights: each would pass through a recompute's hooks, and they live longer than any node anyway.
Suffixes: T tokens, H heads, d head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.model.lora import ADAPTER
from moe.kernels.linear import PackedLinear

Grads = tuple[Tensor | None, ...]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
"""Modules by which a text model's attention is recognised; the tower's has one projection for all three."""
CACHES = ("cache", "past_key_values")
"""Names that transformers gives to the keys and values of earlier tokens."""


def join_nodes(model: nn.Module) -> None:
    """Let a model's RMS norms, text attention and dense LoRA use these nodes; modules, weights and names stay."""
    module: Any
    for module in list(model.modules()):
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = Norm
        elif type(module) is LoraLinear:
            module.__class__ = DenseLora
            module.parts = module.base_layer, module.lora_A[ADAPTER], module.lora_B[ADAPTER]
            module.drops, module.scale = isinstance(module.lora_dropout[ADAPTER], nn.Dropout), module.scaling[ADAPTER]
        elif type(module) is not Attention and all(hasattr(module, name) for name in ATTENTION):
            module.plain, module.__class__ = type(module), Attention


class Norm(nn.Module):
    """transformers' RMS norm over the last dim."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """Return weight * x / root mean square."""
        y: Tensor = _Norm.apply(x, x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]  # torch's stub
        return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, scale = _norm(x, weight, epsilon)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, scale = ctx.saved_tensors
        first, second, of_weight = _norm_back(grad, x, ctx.weight, scale)
        if x.dtype == torch.float32:
            return first, second, of_weight, None
        return first.add_(second).to(x.dtype), None, of_weight, None  # a chain adds them up in float32, then casts


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the normalised x, and the scale of each token."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype), scale


def _norm_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradient of x through the product, that through the scale, and that of a weight that trains."""
    wide, of_weight = x.float(), None
    if weight.requires_grad:
        of_weight = (grad * (wide * scale).to(x.dtype)).sum_to_size(weight.shape)
    grad = (grad * weight).float()
    # a chain also has the factors -1/2 and 2, which cause no rounding
    of_square = (grad * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
    return grad.mul_(scale), wide * of_square, of_weight


class Attention(nn.Module):
    """transformers' attention over text, with one node for the norms of queries and keys and their rotary positions."""

    plain: Any
    """The class that transformers gave this module."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return the attention output and scores; calls that training does not make go to transformers' own forward."""
        this: Any = self  # with the attributes of transformers' class
        norms = (this.q_norm, this.k_norm)
        attend = ALL_ATTENTION_FUNCTIONS.get(this.config._attn_implementation)
        if attend is None or any(others.get(name) is not None for name in CACHES) or any(map(_is_hooked, norms)):
            return this.plain.forward(this, hidden_states, position_embeddings, attention_mask, **others)
        shape = (*hidden_states.shape[:-1], -1, this.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (this.q_proj, this.k_proj, this.v_proj))
        weights = (norm.weight for norm in norms)
        q, k = _Turned.apply(q, k, *weights, *position_embeddings, norms[0].variance_epsilon)  # type: ignore[no-untyped-call]
        out, scores = attend(
            this,
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attention_mask,
            scaling=this.scaling,
            dropout=this.attention_dropout if this.training else 0.0,
            **others,
        )
        return this.o_proj(out.reshape(*shape[:-2], -1).contiguous()), scores


def _is_hooked(module: nn.Module) -> bool:
    """Say whether somebody wants this module called: the engine, or a replay that looks at what each module returns."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


class _Turned(torch.autograd.Function):
    """Normalises queries and keys [.., T, H, d] and rotates them by their positions."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        first, second = sin.chunk(2, -1)
        ctx.weights = q_weight, k_weight
        ctx.table = cos.unsqueeze(-2), torch.cat((-first, second), -1).unsqueeze(-2)
        (q_y, q_scale), (k_y, k_scale) = _norm(q, q_weight, epsilon), _norm(k, k_weight, epsilon)
        ctx.save_for_backward(q, k, q_scale, k_scale)
        return _turn(q_y, *ctx.table), _turn(k_y, *ctx.table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> Grads:
        q, k, q_scale, k_scale = ctx.saved_tensors
        grads, of_weights = [], []
        for grad, x, weight, scale in zip((q_grad, k_grad), (q, k), ctx.weights, (q_scale, k_scale), strict=True):
            first, second, of_weight = _norm_back(_turn_back(grad, *ctx.table), x, weight, scale)
            grads.append(first.add_(second).to(x.dtype))
            of_weights.append(of_weight)
        return *grads, *of_weights, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x; the first half of `sin` is negated."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def _turn_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1))


class DenseLora(LoraLinear):  # type: ignore[misc]  # peft is untyped
    """PEFT's LoRA around a linear layer; it uses PEFT's forward if that does more, or if a part has hooks."""

    parts: tuple[Any, Any, Any]
    """The frozen layer, and the layers of both factors."""
    drops: bool
    scale: float

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x W^T + b + scale (x A^T) B^T."""
        base, a, b = self.parts
        hooked = _is_hooked(base) or _is_hooked(a) or _is_hooked(b)
        if hooked or self._disable_adapters or self.merged_adapters or (self.drops and self.training):
            y: Tensor = super().forward(x, *args, **kwargs)
        else:
            y = _Lora.apply(x, x, a.weight, b.weight, base, self.scale)  # type: ignore[no-untyped-call]
        return y


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, a: Tensor, b: Tensor, base: Any, scale: float) -> Tensor:
        assert not base.weight.requires_grad, "the layer that LoRA adapts must be frozen"
        thin = F.linear(x, a)
        ctx.save_for_backward(x, thin)
        ctx.weights, ctx.scale = (a, b, base), scale
        return F.linear(x, _weight(base, x), base.bias).add_(F.linear(thin, b).mul_(scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, thin = ctx.saved_tensors
        a, b, base = ctx.weights
        grad = grad.flatten(0, -2)
        wide = grad * ctx.scale
        grad_thin = wide.mm(b)
        of_factors = grad_thin.t().mm(x.flatten(0, -2)), wide.t().mm(thin.flatten(0, -2))
        if not ctx.needs_input_grad[0]:
            return None, None, *of_factors, None, None
        return grad_thin.mm(a).view_as(x), grad.mm(_weight(base, grad)).view_as(x), *of_factors, None, None


def _weight(layer: Any, like: Tensor) -> Tensor:
    """Return the weight of a frozen linear layer; a packed one is unpacked in the type of `like`."""
    weight: Tensor = layer.whole(like) if isinstance(layer, PackedLinear) else layer.weight
    return weight

"""A small stack of routers and experts with a `Balance`, in every recompute mode, for the tests of balance."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe.balance import Balance

LAYERS, HIDDEN, EXPERTS, TOP_K, INNER, CLASSES = 3, 12, 7, 2, 5, 9
COEFFICIENT, Z_COEFFICIENT = 0.3, 0.02  # large, so that a wrong term is visible next to the cross entropy
CPU = torch.device("cpu")

# Tokens of [rank][micro-batch]: uneven, one empty row, one micro-batch of padding on one rank and one on all ranks.
TOKENS = [[33, 12, 20, 6], [18, 9, 0, 25]]
VALID = [[27, 12, 11, 0], [18, 0, 0, 0]]


class Layer(nn.Module):
    """A router and its experts with a residual; every expert is computed for every token."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / INNER**0.5)

    def forward(self, x_TD: Tensor, balance: Balance) -> Tensor:
        logits_TE = self.router(x_TD)
        probs_TE = logits_TE.float().softmax(-1)
        topk_TK = probs_TE.topk(TOP_K).indices
        probs_TE = balance(self.index, logits_TE, probs_TE, topk_TK)
        return self.mix(x_TD, probs_TE, topk_TK)

    def mix(self, x_TD: Tensor, probs_TE: Tensor, topk_TK: Tensor) -> Tensor:
        scores_TK = probs_TE.gather(1, topk_TK)
        scores_TK = scores_TK / scores_TK.sum(1, keepdim=True)
        weights_TE = torch.zeros_like(probs_TE).scatter(1, topk_TK, scores_TK)
        y_TED = torch.einsum("tef,efd->ted", F.silu(torch.einsum("td,edf->tef", x_TD, self.up)), self.down)
        return x_TD + (weights_TE.to(x_TD.dtype)[:, :, None] * y_TED).sum(1)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))
        self.head = nn.Linear(HIDDEN, CLASSES)
        for layer in self.layers:
            layer.router.weight.data.mul_(2.5)  # uneven loads

    def forward(self, x_TD: Tensor, balance: Balance, recompute: str) -> Tensor:
        for layer in self.layers:
            x_TD = RECOMPUTE[recompute](layer, x_TD, balance)
        return self.head(x_TD)


def _keep(*kept: object):
    """Return a context_fn that keeps the results of these operations, or without any, of all but in-place ones."""

    def policy(ctx, op, *args, **kwargs):
        keep = op in kept if kept else not op._schema.is_mutable
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


aten = torch.ops.aten
RECOMPUTE = {
    "none": lambda layer, *args: layer(*args),
    "layer": functools.partial(checkpoint, use_reentrant=False),
    "kept top-k": functools.partial(checkpoint, use_reentrant=False, context_fn=_keep(aten.topk.default)),
    "kept sums": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=_keep(aten.topk.default, aten.sum.dim_IntList, aten.gather.default, aten.bmm.default),
    ),
    "kept all": functools.partial(checkpoint, use_reentrant=False, context_fn=_keep()),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
}


def micro_batch(rank: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, labels and valid mask of one rank's micro-batch."""
    generator = torch.Generator().manual_seed(100 * rank + micro)
    tokens = TOKENS[rank][micro]
    x_TD = torch.randn(tokens, HIDDEN, generator=generator) + torch.randn(HIDDEN, generator=generator)
    labels_T = torch.randint(CLASSES, (tokens,), generator=generator)
    valid_T = torch.zeros(tokens, dtype=torch.bool)
    valid_T[torch.randperm(tokens, generator=generator)[: VALID[rank][micro]]] = True
    return x_TD, labels_T, valid_T


def make_balance(mode: str = "global", z_coefficient: float = Z_COEFFICIENT, **changed) -> Balance:
    arguments = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "device": CPU, **changed}
    return Balance(mode=mode, coefficient=COEFFICIENT, z_coefficient=z_coefficient, **arguments)


def route(balance: Balance, layer: int, logits_TE: Tensor, base_topk_TK: Tensor | None = None) -> Tensor:
    probs_TE = logits_TE.float().softmax(-1)
    return balance(layer, logits_TE, probs_TE, probs_TE.topk(balance.top_k).indices, base_topk_TK)

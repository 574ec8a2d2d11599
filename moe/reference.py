"""The reference for a sparse block, written to be read: one rank, one expert at a time, plain autograd.

Every faster path is tested against this file; training does not use it. Suffixes: T tokens, K top-k, D hidden,
F expert hidden, E experts, N a step's valid tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """LoRA of one layer's experts, A [E, r, in] and B [E, out, r]; gate and up share one A."""

    gate_up_A: Tensor
    gate_up_B: Tensor
    down_A: Tensor
    down_B: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The router's answer for T tokens."""

    logits_TE: Tensor
    probs_TE: Tensor
    topk_TK: Tensor
    scores_TK: Tensor


def route(x_TD: Tensor, gate_ED: Tensor, *, top_k: int, normalise: bool = True) -> Routing:
    """Take the softmax over all experts in float32 and its k largest values, which sum to 1 if `normalise`."""
    logits_TE = x_TD @ gate_ED.T
    probs_TE = logits_TE.float().softmax(-1)
    topk_TK = probs_TE.topk(top_k, dim=-1).indices
    scores_TK = probs_TE.gather(-1, topk_TK)
    if normalise:
        scores_TK = scores_TK / scores_TK.sum(-1, keepdim=True)
    return Routing(logits_TE=logits_TE, probs_TE=probs_TE, topk_TK=topk_TK, scores_TK=scores_TK.to(x_TD.dtype))


def expert(x_RD: Tensor, index: int, gate_up: Tensor, down: Tensor, factors: Factors | None) -> Tensor:
    """Return one expert's output: down(silu(gate x) * up x), each weight with its low-rank part added to it."""
    w_gate_up, w_down = gate_up[index], down[index]
    if factors is not None:
        w_gate_up = w_gate_up + factors.scale * factors.gate_up_B[index] @ factors.gate_up_A[index]
        w_down = w_down + factors.scale * factors.down_B[index] @ factors.down_A[index]
    gate, up = (x_RD @ w_gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w_down.T


def experts(x_RD: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, factors: Factors | None = None) -> Tensor:
    """Return y_RD of rows sorted by expert; `counts` holds the number of rows of each."""
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    parts = [x_RD[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return torch.cat([expert(part, index, gate_up, down, factors) for index, part in enumerate(parts)])


def block(x_TD: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, factors: Factors | None = None) -> Tensor:
    """Return y_TD: for each token the sum of its experts' outputs, weighted by the router's scores."""
    y_TD = torch.zeros_like(x_TD)
    for index in range(gate_up.shape[0]):
        tokens, places = (routing.topk_TK == index).nonzero(as_tuple=True)
        y = expert(x_TD[tokens], index, gate_up, down, factors) * routing.scores_TK[tokens, places, None]
        y_TD = y_TD.index_add(0, tokens, y)
    return y_TD


def load_E(topk_TK: Tensor, valid_T: Tensor, *, num_experts: int) -> Tensor:
    """Return c_e, how many valid tokens chose each expert."""
    chosen_TE = F.one_hot(topk_TK, num_experts).sum(1)
    return (chosen_TE * valid_T[:, None]).sum(0)


def balance_loss(probs_TE: Tensor, topk_TK: Tensor, valid_T: Tensor) -> Tensor:
    """Return E sum_e f_e P_e of one layer: 1 if even, E / K if all tokens choose the same K experts with certainty.

    f_e = c_e / (K N) is the share of choices that fell on e and has no gradient; P_e is the mean probability of e.
    """
    experts_, top_k = probs_TE.shape[1], topk_TK.shape[1]
    tokens = valid_T.sum()
    f_E = load_E(topk_TK, valid_T, num_experts=experts_).float() / (top_k * tokens)
    p_E = (probs_TE * valid_T[:, None]).sum(0) / tokens
    return experts_ * (f_E * p_E).sum()


def z_loss(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Return the mean over valid tokens of logsumexp(logits)^2."""
    return (logits_TE.float().logsumexp(-1).square() * valid_T).sum() / valid_T.sum()


@dataclass(frozen=True, kw_only=True)
class LoadStatistics:
    """The evenness of one layer's use of its experts."""

    max_over_mean: float
    entropy: float
    dead: int


def load_statistics(counts_E: Tensor) -> LoadStatistics:
    """Return the busiest expert's load over the mean, the entropy of f over log E, and the number of unused experts."""
    f_E = counts_E.double() / counts_E.sum()
    entropy = -(f_E * f_E.clamp_min(1e-300).log()).sum() / torch.tensor(float(len(f_E))).double().log()
    return LoadStatistics(
        max_over_mean=float(f_E.max() * len(f_E)), entropy=float(entropy), dead=int((counts_E == 0).sum())
    )


def agreement(topk_TK: Tensor, base_topk_TK: Tensor, valid_T: Tensor) -> float:
    """Return the share of the base router's k experts that the router also chose, as a mean over valid tokens."""
    same_T = (topk_TK[:, :, None] == base_topk_TK[:, None, :]).any(-1).float().mean(-1)
    return float((same_T * valid_T).sum() / valid_T.sum())

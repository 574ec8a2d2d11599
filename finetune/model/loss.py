"""Cross entropy of the supervised tokens without holding all their logits: tile by tile, in one call of the head.

The head is called once per micro-batch on every rank, even without a supervised token: under ZeRO-3 a call per tile
would gather the head more often on one rank than on another. The forward computes gradients while a tile's logits
exist, so that backward needs neither logits nor the head: only one gradient per supervised token is kept.

Normalisation, where n_i is the sum of the loss weights of sample i, over all samples of all ranks of a step:

    token   sum_i n_i mean_i / sum_i n_i             every token weighs the same
    sample  sum_i mean_i / number of samples          every sample weighs the same
    sqrt    sum_i sqrt(n_i) mean_i / sum_i sqrt(n_i)  in between: a token of sample i weighs 1 / sqrt(n_i)
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.stream.batch import LossSums
from finetune.config import LOSS_SLICES, LOSS_TILE_BYTES
from finetune.model.row import Row
from finetune.ranks.collectives import sum_over_ranks

Normalise = Literal["token", "sample", "sqrt"]
Compare = Callable[[Tensor, Tensor, int], Any]


class Losses(NamedTuple):
    """The losses of one micro-batch. `objective` is this rank's sum to back-propagate; the rest is for reports."""

    objective: Tensor  # scalar: sum over supervised tokens of weight x normalisation factor x cross entropy
    # for a row in slices both cover this rank's labels only: their sums over the group are those of the row
    ce_S: Tensor  # sum over a sample's tokens of weight x cross entropy
    weights_S: Tensor  # sum of a sample's weights: ce_S / weights_S is its mean loss


def step_sums(sums: LossSums, device: torch.device) -> LossSums:
    """Return the sums of a step over all ranks; every rank must call this once, before the first forward."""
    tokens, samples, sqrt = sum_over_ranks([sums.tokens, sums.samples, sums.sqrt], device)
    return LossSums(tokens=tokens, samples=samples, sqrt=sqrt)


def normaliser(sums: LossSums, how: Normalise) -> float:
    """Return the divisor of a step's summed objectives; 0 if the step has no supervised token."""
    return {"token": sums.tokens, "sample": sums.samples, "sqrt": sums.sqrt}[_known(how)]


def factors(weights_T: Tensor, sample_ids_T: Tensor, samples: int, how: Normalise) -> tuple[Tensor, Tensor]:
    """Return the factor of each token's cross entropy, and the sum of each sample's weights.

    Both are float32. For a row in slices, pass the weights of the entire row.
    """
    owned_T, owner_T = sample_ids_T >= 0, sample_ids_T.clamp(min=0).long()
    weights_T = weights_T.double() * owned_T
    n_S = torch.zeros(max(samples, 1), dtype=torch.float64, device=weights_T.device).index_add(0, owner_T, weights_T)
    exponent = {"token": 0.0, "sample": -1.0, "sqrt": -0.5}[_known(how)]
    factors_S = n_S.clamp(min=torch.finfo(torch.float32).tiny).pow(exponent)
    return (weights_T * factors_S[owner_T]).float(), n_S[:samples].float()


def row_losses(head: nn.Module, hidden_TD: Tensor, row: Row, how: Normalise) -> Losses:
    """Return a row's losses from the last hidden states of this rank's tokens; call the head exactly once.

    They cover the labels that these tokens predict: the last token of a slice predicts the first label after it. The
    factors are computed from the weights of the entire row.
    """
    batch, labels_N = row.batch, row.labels_N
    weights_T, ids_T = batch.loss_weights[0], batch.input_ids[0]
    owners_T = batch.sample_ids[0]
    scaled_T, n_S = factors(weights_T, owners_T, len(batch.keys), how)
    objective, ce_N = head(hidden_TD[labels_N - 1 - row.part.start], ids_T[labels_N], scaled_T[labels_N])
    owners_N = owners_T[labels_N].long()
    ce_S = torch.zeros_like(n_S).index_add(0, owners_N, weights_T[labels_N] * ce_N)
    mine_S = torch.zeros_like(n_S).index_add(0, owners_N, weights_T[labels_N])
    return Losses(objective=objective, ce_S=ce_S, weights_S=mine_S)


def step_loss(rows: Sequence[Losses], total: float) -> tuple[float, list[float]]:
    """Return a step's loss over all ranks, and this rank's part of each of its samples', in their order.

    `rows` are this rank's, `total` is the step's; every rank must call this. The device is waited for once.
    """
    objective = torch.stack([row.objective.double() for row in rows]).sum()
    mine, *by_sample = torch.cat([objective[None], *(row.ce_S.double() for row in rows)]).tolist()
    return sum_over_ranks([mine], objective.device)[0] / total, by_sample


def _known(how: str) -> str:
    if how not in ("token", "sample", "sqrt"):
        raise ValueError(f"loss.normalise must be one of token, sample, sqrt, got {how!r}")
    return how


def tile_head(model: Any, *, tile_bytes: int = LOSS_TILE_BYTES) -> None:
    """Let the model's head compute losses too; its weight, its name and its logits for one argument stay the same."""
    head = model.lm_head
    if isinstance(head, TiledHead):
        return
    if type(head) is not nn.Linear or head.bias is not None:
        bias = " with a bias" if type(head) is nn.Linear else ""
        raise ValueError(
            f"the model's head is a {type(head).__name__}{bias}, but the tiled loss needs a linear layer without bias. "
            f"Freeze the head or train it in full: it takes no adapter"
        )
    head.__class__ = TiledHead  # the same module, so that references to it and to its weight stay valid
    head.tile_bytes = tile_bytes


def _to_exponentials(logits_nV: Tensor, label_n1: Tensor) -> Tensor:
    """Turn float32 logits into exponentials of their distance to the row's largest; return the cross entropies."""
    logits_nV -= logits_nV.amax(-1, keepdim=True)
    picked_n1 = logits_nV.gather(1, label_n1)
    return (logits_nV.exp_().sum(-1, keepdim=True).log() - picked_n1)[:, 0]


class TiledHead(nn.Linear):
    """The vocabulary head. With labels it returns the weighted sum of cross entropies, and each of them."""

    tile_bytes: int

    def forward(  # a head that is also a loss
        self,
        hidden_ND: Tensor,
        labels_N: Tensor | None = None,
        weights_N: Tensor | None = None,
        *,
        compare: Compare | None = None,
    ) -> Any:
        """Return logits for hidden states alone, else (sum of weight x cross entropy, cross entropy of each).

        With `compare`, return its result for hidden states, the gathered weight and the bytes of a tile.
        """
        if compare is not None:
            return compare(hidden_ND, self.weight, self.tile_bytes)
        if labels_N is None:
            return super().forward(hidden_ND)
        needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_ND, self.weight)]
        losses: tuple[Tensor, Tensor] = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's stub
            hidden_ND, self.weight, labels_N, weights_N, self.tile_bytes, needed
        )
        return losses


class _TiledCrossEntropy(torch.autograd.Function):
    """Losses and their gradients, tile by tile; softmax and sums in float32, products in the dtype of the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        tile_bytes: int,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor]:
        ce_N = torch.empty_like(labels_N, dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND) if needed[0] else None
        # none for a frozen head; the tiles of a trained one are added up in float32
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needed[1] else None
        count, vocab = len(labels_N), weight_VD.shape[0]
        rows = min(max(1, tile_bytes // (4 * vocab)), count)
        # One buffer for all tiles, changed in place: logits, then exponentials, then gradients of the logits. There is
        # a second one in the dtype of the products if that is not float32.
        wide = torch.empty(rows, vocab, dtype=torch.float32, device=hidden_ND.device)
        narrow = wide if weight_VD.dtype == torch.float32 else torch.empty_like(wide, dtype=weight_VD.dtype)
        for first in range(0, count, max(rows, 1)):
            tile = slice(first, min(first + rows, count))
            logits_nV, product_nV = (buffer[: tile.stop - first] for buffer in (wide, narrow))
            torch.mm(hidden_ND[tile], weight_VD.T, out=product_nV)
            logits_nV.copy_(product_nV)
            ce_N[tile] = _to_exponentials(logits_nV, labels_N[tile, None])
            if not any(needed):
                continue
            logits_nV *= weights_N[tile, None] / logits_nV.sum(-1, keepdim=True)
            logits_nV.scatter_add_(1, labels_N[tile, None], -weights_N[tile, None])
            product_nV.copy_(logits_nV)
            if grad_ND is not None:
                torch.mm(product_nV, weight_VD, out=grad_ND[tile])
            if grad_VD is not None:
                for sum_vD, part_nv in zip(grad_VD.chunk(LOSS_SLICES), product_nV.chunk(LOSS_SLICES, 1), strict=True):
                    sum_vD += part_nv.T @ hidden_ND[tile]
        del wide, narrow
        ctx.scaled = False
        ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(ce_N)
        return (weights_N.double() @ ce_N.double()).float(), ce_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        assert not ctx.scaled, "the gradients made in forward are scaled in place: only one backward per forward"
        ctx.scaled = True
        grad_ND, grad_VD = (made if made is None else made.mul_(grad) for made in ctx.saved_tensors)
        return grad_ND, grad_VD, None, None, None, None

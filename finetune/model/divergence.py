"""Compares the tuned model with its base on one packed row: loss and hits of both, and the divergence between them.

Logits over the vocabulary exist for one tile of tokens at a time, of both models at once:

    KL(base || tuned) = sum_v p_v (z_v - z'_v) - log sum exp z + log sum exp z'      p = softmax(z), z of the base
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.model.forward import PackedModel
from finetune.model.lora import adapters_off
from finetune.model.row import Row

BUFFERS = 3
"""Tensors that share the bytes of a tile: the logits of both models and one intermediate result."""


class Compared(NamedTuple):
    """Values of a row's supervised tokens; those that need a base are zeros without one."""

    owners_N: Tensor  # the sample of the row that each token belongs to
    weights_N: Tensor
    ce_N: Tensor
    hits_N: Tensor  # whether the most likely token is the right one
    base_ce_N: Tensor
    kl_N: Tensor


@torch.no_grad()
def compare_row(packed: PackedModel, row: Row, *, with_base: bool) -> Compared:
    """Run one row, and `with_base` once more without adapters; call the head once. Every rank must call this.

    The result covers the labels that this rank's part of the row predicts; the last of them may lie in the next part.
    """
    batch, labels_N = row.batch, row.labels_N
    hidden_ND, base_ND = packed.hidden(row)[labels_N - 1 - row.part.start], None
    if with_base:
        with adapters_off(packed):
            base_ND = packed.hidden(row)[labels_N - 1 - row.part.start]
    compare = partial(compare_tiles, base_ND=base_ND, labels_N=batch.input_ids[0, labels_N])
    of_labels = packed.model.lm_head(hidden_ND, compare=compare)
    return Compared(batch.sample_ids[0, labels_N].long(), batch.loss_weights[0, labels_N], *of_labels)


def compare_tiles(
    hidden_ND: Tensor, weight_VD: Tensor, tile_bytes: int, *, base_ND: Tensor | None, labels_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cross entropies, hits, the base's cross entropies and the divergences of every token."""
    ce_N, base_ce_N, kl_N = (hidden_ND.new_zeros(len(labels_N), dtype=torch.float32) for _ in range(3))
    hits_N = torch.zeros_like(labels_N, dtype=torch.bool)
    rows = max(1, tile_bytes // (4 * BUFFERS * weight_VD.shape[0]))
    for first in range(0, len(labels_N), rows):
        tile = slice(first, first + rows)
        label_n1 = labels_N[tile, None]
        tuned_nV, tuned_n = _logits(hidden_ND[tile], weight_VD)
        hits_N[tile] = tuned_nV.argmax(-1) == labels_N[tile]
        ce_N[tile] = tuned_n - tuned_nV.gather(1, label_n1)[:, 0]
        if base_ND is None:
            continue
        base_nV, base_n = _logits(base_ND[tile], weight_VD)
        base_ce_N[tile] = base_n - base_nV.gather(1, label_n1)[:, 0]
        tuned_nV.neg_().add_(base_nV)
        base_nV.sub_(base_n[:, None]).exp_()
        kl_N[tile] = base_nV.mul_(tuned_nV).sum(-1) - base_n + tuned_n
        del tuned_nV, base_nV
    return ce_N, hits_N, base_ce_N, kl_N


def _logits(hidden_nD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 logits less each token's largest, and the logarithm of the sum of their exponentials."""
    logits_nV = (hidden_nD @ weight_VD.T).float()
    logits_nV -= logits_nV.amax(-1, keepdim=True)
    return logits_nV, logits_nV.exp().sum(-1).log()

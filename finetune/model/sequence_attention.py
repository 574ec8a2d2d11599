"""Attention over rows in slices (Ulysses): each rank gets all tokens for some heads, attends, and sends them back.

One all-to-all collects queries, keys and values, and one returns the result; both are functional and differentiable,
so backward sends the gradients the other way. If there are more slices than key and value heads, these are repeated:
each rank needs those of its queries over the entire row. The borders of the entire row come as the four variable-length
arguments, so the same code computes attention inside the samples as for rows that are not sliced.

Suffixes: H heads, h heads of one rank, T tokens of the row, t of the slice, d head size, S slices.
"""

from collections.abc import Callable, Iterable
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.model.sequence import SequenceGroup
from finetune.model.varlen import NO_BORDERS, kernel, segments, varlen
from finetune.settings.attention import AttentionName
from moe.dispatch import exchange

NAMES: dict[AttentionName, str] = {
    "segments": "sequence_segments",
    "varlen": "sequence_varlen",
    "sdpa": "sequence_masked",
    "flash_attention_2": "sequence_kernel",
}
"""Names under which transformers knows attention over slices, by the attention that computes it."""


def use_sequence(model: Any, sizes: Iterable[int], attention: AttentionName) -> None:
    """Let the text model attend over slices, if a call gives it a sequence group, or over complete rows.

    The tower stays as it is, because it sees complete images.
    """
    heads = model.config.get_text_config().num_attention_heads
    wrong = [sp for sp in sizes if heads % sp]
    if wrong:
        raise ValueError(
            f"parallel.sp: {wrong[0]} must divide the {heads} attention heads, because each rank of a group computes "
            f"an equal share of them. Set parallel.sp to a divisor of {heads}"
        )
    for name, registered in NAMES.items():
        ALL_ATTENTION_FUNCTIONS.register(registered, _attention(name))
    composite = hasattr(model.config, "text_config")
    model.set_attn_implementation({"text_config": NAMES[attention]} if composite else NAMES[attention])


def key_copies(kv_heads: int, slices: int) -> int:
    """Return how often each key and value head is repeated so that every slice gets one of its own."""
    return slices // gcd(kv_heads, slices)


def _attention(name: AttentionName) -> Callable[..., tuple[Tensor, None]]:
    inside = {"segments": segments, "varlen": varlen, "sdpa": _masked, "flash_attention_2": kernel}[name]

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        sequence: SequenceGroup | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if sequence is None:
            return inside(module, query, key, value, attention_mask, **others)
        copies = key_copies(key.shape[1], sequence.size)
        key, value = (x.repeat_interleave(copies, dim=1) if copies > 1 else x for x in (key, value))
        query, key, value = _heads_for_tokens([query, key, value], sequence)
        out, _ = inside(module, query, key, value, attention_mask, **others)
        return _tokens_for_heads(out, sequence), None

    return attend


def _heads_for_tokens(tensors: list[Tensor], group: SequenceGroup) -> list[Tensor]:
    """Turn [1, H, t, d], all heads of a slice, into [1, h, T, d], some heads of the row; one exchange for all."""
    parts = [x[0].reshape(group.size, -1, *x.shape[2:]) for x in tensors]  # [S, h, t, d]
    ones = [1] * group.size
    came_Shtd = exchange(torch.cat(parts, dim=1), ones, ones, group.ranks)
    row_hTd = came_Shtd.transpose(0, 1).flatten(1, 2)
    return [x[None] for x in torch.split(row_hTd, [part.shape[1] for part in parts])]


def _tokens_for_heads(out: Tensor, group: SequenceGroup) -> Tensor:
    """Turn [1, T, h, d] back into [1, t, H, d]."""
    ones = [1] * group.size
    came_Sthd = exchange(out[0].reshape(group.size, -1, *out.shape[2:]), ones, ones, group.ranks)
    return came_Sthd.transpose(0, 1).flatten(1, 2)[None]


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Call sdpa with a mask, so that a token sees only earlier tokens of its own sample."""
    if cu_seq_lens_q is None:
        raise ValueError(f"{NO_BORDERS}: its samples would see each other. Pass all of Batch.attention to the model")
    at_T = torch.arange(query.shape[2], device=query.device, dtype=cu_seq_lens_q.dtype)
    sample_T = torch.searchsorted(cu_seq_lens_q, at_T, right=True)
    mask_TT = (sample_T[:, None] == sample_T) & (at_T[:, None] >= at_T)
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_TT,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None

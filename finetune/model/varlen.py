"""Attention inside the samples of a packed row, as functions that transformers' models call by name.

They take the samples' borders from the four variable-length arguments and build no mask. transformers gives no mask
either to a model whose attention has one of the names registered here. The vision tower, whose samples are frames,
calls them once per block for all frames, without causality.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.settings.attention import Machine

NO_BORDERS = "the attention of a packed row was called without the borders of its samples"


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return what this machine offers to attention on `device` in `dtype`."""
    cuda = device.type == "cuda"
    return Machine(
        cuda=cuda,
        half=dtype in (torch.bfloat16, torch.float16),
        capability=torch.cuda.get_device_capability(device) if cuda else (0, 0),
        flash_attention_2=importlib.util.find_spec("flash_attn") is not None,
    )


def register() -> None:
    """Register our functions with transformers; calling it again changes nothing."""
    for name, function in OURS.items():
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_ATTENTION_FUNCTIONS.register(AT_ONCE + name, function)


def attend_at_once(tower: Any) -> None:
    """Let a tower's attention take all frames in one call, with their borders, instead of one call per frame.

    transformers decides by the name: it passes borders to an attention with "flash" in its name. Otherwise it cuts the
    tower's input into frames by a list that each block reads from the device, three times.
    """
    name = {"sdpa": "segments"}.get(tower.config._attn_implementation, tower.config._attn_implementation)
    if name in OURS:
        register()
        tower.config._attn_implementation = AT_ONCE + name


def segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    borders: tuple[int, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Call torch's sdpa on one sample after the other; works on every device and in every dtype.

    `borders` are `cu_seq_lens_q` as numbers: without them the host waits for the device.
    """
    causal = _is_causal(module, attention_mask, cu_seq_lens_q)
    parts = [slice(None)]
    if cu_seq_lens_q is not None:
        cuts = borders or cu_seq_lens_q.tolist()
        parts = [slice(first, last) for first, last in zip(cuts, cuts[1:], strict=False) if last > first]
    outputs = [
        nn.functional.scaled_dot_product_attention(
            query[:, :, part],
            key[:, :, part],
            value[:, :, part],
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for part in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Call torch's variable-length kernel once for all samples; needs CUDA and bfloat16."""
    if cu_seq_lens_q is None or dropout:
        return segments(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            cu_seq_lens_q=cu_seq_lens_q,
            **others,
        )
    causal = _is_causal(module, attention_mask, cu_seq_lens_q)
    q_THd, k_THd, v_THd = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _asks_for_gqa(varlen_attn) else {}
    out = varlen_attn(
        q_THd,
        k_THd,
        v_THd,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0 if causal else -1),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[None], None


@cache
def _asks_for_gqa(kernel: Callable[..., object]) -> bool:
    """Return whether the kernel has an argument for fewer key heads; torch 2.11's has none and accepts them."""
    return "enable_gqa" in signature(kernel).parameters


def kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Call flash-attention's kernel directly: transformers would first look for a mask, with one wait per row."""
    from flash_attn import flash_attn_varlen_func  # installed wherever model.attention chose it

    q_THd, k_THd, v_THd = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Tensor = flash_attn_varlen_func(
        q_THd,
        k_THd,
        v_THd,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=_is_causal(module, attention_mask, cu_seq_lens_q),
    )
    return out[None], None


OURS: dict[str, Callable[..., tuple[Tensor, None]]] = {"varlen": varlen, "segments": segments, "kernel": kernel}
"""Our functions by the names that transformers' models get; `kernel` stands for `flash_attention_2` here."""

AT_ONCE = "flash_"
"""Prefix to one of our names: the same function, called by a tower for all of its frames at once."""


def _is_causal(module: nn.Module, mask: Tensor | None, cuts: Tensor | None) -> bool:
    """Return whether this attention is causal; raise ValueError without borders, as it would leak between samples."""
    assert mask is None, "a mask together with borders: one of the two would be ignored"
    causal = bool(getattr(module, "is_causal", True))
    if causal and cuts is None:
        raise ValueError(
            f"{NO_BORDERS}: its samples would see each other. Pass all of Batch.attention to the model, or build it "
            f"with model.attention: sdpa for rows of one sample"
        )
    return causal

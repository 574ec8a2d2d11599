"""Chooses the attention of packed rows, and says why. Loads no torch: the caller describes the machine.

In a packed row attention must stay inside each sample. A kernel that takes the samples' borders does so at no cost; a
mask grows with the square of the row's tokens.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

AttentionName = Literal["flash_attention_2", "varlen", "segments", "sdpa"]
"""Flash-attention's kernel, torch's own kernel for variable lengths, sdpa sample by sample, and sdpa with a mask."""

MASK_TOKENS = 8192
"""Tokens of the longest row for `sdpa`: its mask then has 64 MiB and is read in every layer."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The properties of a machine that decide the choice: device, data type and available kernels."""

    cuda: bool
    half: bool  # bfloat16 or float16, the only types that the kernels support
    capability: tuple[int, int] = (0, 0)
    flash_attention_2: bool = False  # the package can be imported


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The attention of the text model, and the sentence that explains it at the start."""

    name: AttentionName
    reason: str


def choose_attention(
    choice: str, *, tokens: int, machine: Machine, head_sizes: Collection[int] = ()
) -> AttentionChoice:
    """Decide `model.attention` for rows of `tokens`; refuse a missing kernel and too wide a mask.

    `head_sizes` are those of the text model and of the vision tower, which uses the same kernel.
    """
    missing = {name: _missing(name, machine, head_sizes) for name in get_args(AttentionName)}
    usable = [name for name in get_args(AttentionName) if not missing[name] and not _too_wide(name, tokens)]
    best: AttentionName = usable[0]  # `segments` needs nothing, so there always is one
    if choice == "auto":
        without = "; ".join(f"{name}: {why}" for name, why in missing.items() if why)
        return AttentionChoice(name=best, reason=f"auto: {best}" + (f" ({without})" if without else ""))
    if choice not in missing:
        raise ValueError(f"model.attention must be one of auto, {', '.join(missing)}, got {choice!r}")
    name: AttentionName = choice  # type: ignore[assignment]  # checked the line before
    if missing[name]:
        raise ValueError(
            f"model.attention: {name} cannot be used: {missing[name]}. Use auto, which selects {best} here"
        )
    if _too_wide(name, tokens):
        raise ValueError(
            f"model.attention: {name} builds a mask of {tokens:,} x {tokens:,} for a packed row "
            f"({tokens**2 / 2**20:,.0f} MiB); the limit is {MASK_TOKENS:,} tokens. Use model.attention: {best}, which "
            f"builds none, or data.tokens_per_pack: {MASK_TOKENS}"
        )
    return AttentionChoice(name=name, reason=f"model.attention: {name}")


def _too_wide(name: str, tokens: int) -> bool:
    return name == "sdpa" and tokens > MASK_TOKENS


def _missing(name: AttentionName, machine: Machine, head_sizes: Collection[int]) -> str:
    """Return why the machine or the model cannot use this attention, or an empty text."""
    if name in ("segments", "sdpa"):
        return ""
    if not machine.cuda:
        return "no CUDA device"
    if not machine.half:
        return "the model computes in float32, but the kernel needs bfloat16"
    if machine.capability < (8, 0):
        major, minor = machine.capability
        return f"the device has compute capability {major}.{minor}, but the kernel needs 8.0"
    if name == "flash_attention_2" and not machine.flash_attention_2:
        return "the package flash-attn is not installed"
    unfit = sorted(size for size in head_sizes if size % 8)
    return f"a head size is {unfit[0]}, but the kernel needs multiples of 8" if unfit else ""

"""Expert tensors between the layouts of files and the one in memory. Orientation is named by the caller, never guessed.

In memory: gate_up [E, 2F, D] (gate first), down [E, D, F], A [E, r, in], B [E, out, r]. E may be any part of the
experts: a rank converts its own. Results may be views; make them contiguous where that matters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.placement import Layout


def fused_to_ours(gate_up: Tensor, down: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return gate_up [E, 2F, D] and down [E, D, F] of fused tensors in `layout`."""
    return (gate_up.transpose(1, 2), down.transpose(1, 2)) if layout == "hub" else (gate_up, down)


def ours_to_fused(gate_up: Tensor, down: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the fused tensors in `layout` of ours; the way back is the same transposition."""
    return fused_to_ours(gate_up, down, layout)


def per_expert_to_ours(gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return gate_up [E, 2F, D] and down [E, D, F] of 2-D weights per expert (text Qwen3-MoE on the hub)."""
    pairs = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    return torch.stack(pairs), torch.stack(list(down))


def ours_to_per_expert(gate_up: Tensor, down: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return gate [F, D], up [F, D] and down [D, F] of every expert."""
    gate, up = gate_up.chunk(2, dim=1)
    return list(gate.unbind()), list(up.unbind()), list(down.unbind())


def pack_lora(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return PEFT's file tensors lora_A [E r, in] and lora_B [out, r E] of A [E, r, in] and B [E, out, r].

    PEFT's rows of A go expert by expert, but its columns of B go rank by rank: expert e has B[:, e::E].
    """
    experts, r, _ = a.shape
    assert b.shape[0] == experts
    assert b.shape[2] == r
    return a.reshape(experts * r, -1), b.permute(1, 2, 0).reshape(b.shape[1], r * experts)


def unpack_lora(name: str, lora_a: Tensor, lora_b: Tensor, *, experts: int) -> tuple[Tensor, Tensor]:
    """Return A [E, r, in] and B [E, out, r] of PEFT's file tensors; ValueError unless they are of `experts` experts."""
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1] or lora_a.shape[0] % experts:
        raise ValueError(
            f"{name}: lora_A {list(lora_a.shape)} and lora_B {list(lora_b.shape)} are not the factors of {experts} "
            f"experts: lora_A must be [{experts} r, in] and lora_B [out, r {experts}]"
        )
    r = lora_a.shape[0] // experts
    return lora_a.view(experts, r, -1), lora_b.view(-1, r, experts).permute(2, 0, 1)

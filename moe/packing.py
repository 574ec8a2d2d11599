"""Converts expert LoRA between PEFT's files and memory, where it is A [E, r, in] and B [E, out, r].

E may be any number of experts: a rank converts its own. Results may be views: make them contiguous where it matters.
"""

from torch import Tensor


def pack_lora(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return PEFT's file tensors lora_A [E r, in] and lora_B [out, r E] of A [E, r, in] and B [E, out, r].

    PEFT groups the rows of A by expert, but the columns of B by LoRA rank: expert e has B[:, e::E].
    """
    experts, r, _ = a.shape
    assert b.shape[0] == experts
    assert b.shape[2] == r
    return a.reshape(experts * r, -1), b.permute(1, 2, 0).reshape(b.shape[1], r * experts)


def unpack_lora(name: str, lora_a: Tensor, lora_b: Tensor, *, experts: int) -> tuple[Tensor, Tensor]:
    """Return A [E, r, in] and B [E, out, r] of PEFT's file tensors; raise ValueError if they do not fit `experts`."""
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1] or lora_a.shape[0] % experts:
        raise ValueError(
            f"{name}: lora_A {list(lora_a.shape)} and lora_B {list(lora_b.shape)} are not the factors of {experts} "
            f"experts: lora_A must be [{experts} r, in] and lora_B [out, r {experts}]"
        )
    r = lora_a.shape[0] // experts
    return lora_a.view(experts, r, -1), lora_b.view(-1, r, experts).permute(2, 0, 1)

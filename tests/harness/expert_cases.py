"""Experts, rows and the reference's results for the tests of moe/experts.py; all dimensions differ."""

from typing import Any

import torch
from torch import Tensor, nn

from moe import reference
from moe.experts import ExpertLora, GroupedExperts
from moe.recompute import checkpointed

D, F_, L, R_LORA = 24, 20, 5, 4
FACTORS = ["gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B"]
COUNTS = {
    "mixed": [7, 1, 12, 3, 9],
    "gaps": [0, 9, 0, 14, 0],
    "one takes all": [0, 0, 33, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}
ROW_BYTES = 4 * (6 * F_ + 2 * D)
CHUNKED = {
    "at once": {},
    "in chunks": {"chunk_bytes": 1},
    "in chunks, again in backward": {"chunk_bytes": 1, "keep_bytes": 0},
    "in long chunks, again": {"chunk_bytes": 24 * ROW_BYTES, "keep_bytes": 0},
}
KINDS = [("frozen", True), ("frozen", False), ("lora", True), ("lora", False), ("full", False)]


def made(
    mode: str = "lora", resident: bool = True, *, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any
) -> GroupedExperts:
    """Return experts 2..6 of 8, with weights large enough for every part to matter."""
    lora = ExpertLora(r=R_LORA if dtype == torch.float32 else 8, alpha=6.0) if mode == "lora" else None
    sizes: dict[str, Any] = dict(num_experts=8, local_experts=range(2, 2 + L), hidden=D, intermediate=F_)
    if dtype == torch.bfloat16:
        sizes |= dict(hidden=32, intermediate=24)
    module = GroupedExperts(
        **{
            **dict(name="layers.0.mlp.experts", mode=mode, lora=lora, resident=resident, seed=seed, dtype=dtype),
            **sizes,
            **options,
        }
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key in ("gate_up", "down"):
            weight = getattr(module, key)
            if not module.packings:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    module.init_lora(b_std=0.3)
    return module


def rows_for(module: GroupedExperts, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return input rows, their counts, and a gradient for the output."""
    generator = torch.Generator().manual_seed(sum(counts))
    shape, dtype, device = (sum(counts), module.hidden), module.gate_up.dtype, module.gate_up.device
    x, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), torch.tensor(counts, device=device), grad


def run(module: nn.Module, x: Tensor, counts: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the output and all gradients, by name."""
    module.zero_grad()
    x.grad = None
    y = module(x, counts)
    y.backward(grad)
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


def wanted(module: GroupedExperts, x: Tensor, counts: list[int], grad: Tensor) -> dict[str, Tensor]:
    """Return the same from the reference, in float32."""
    x = x.detach().float().requires_grad_()
    tensors = {key: getattr(module, key).detach().float().clone() for key in ("gate_up", "down")}
    trained = {
        name: p.detach().float().clone().requires_grad_() for name, p in module.named_parameters() if p.requires_grad
    }
    tensors |= trained
    factors = None
    if module.lora is not None:
        names = ["gate_up_A", "gate_up_B", "down_A", "down_B"]
        factors = reference.Factors(
            **dict(zip(names, (tensors[key] for key in FACTORS), strict=True)), scale=module.lora.scale
        )
    y = reference.experts(x, counts, tensors["gate_up"], tensors["down"], factors)
    y.backward(grad.float())
    return {"y": y.detach(), "x": x.grad, **{name: tensor.grad for name, tensor in trained.items()}}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.isfinite(found[name]).all(), name
        largest = value.abs().max() if value.numel() else torch.tensor(0.0)
        error = (found[name].float().cpu() - value.cpu()).abs().max() if value.numel() else torch.tensor(0.0)
        assert error <= tolerance * largest.cpu(), f"{name}: {error} of {largest}"


class Checkpointed(nn.Module):
    def __init__(self, module: GroupedExperts, context_fn: Any) -> None:
        super().__init__()
        self.inner, self.context_fn = module, context_fn

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return checkpointed(self.inner, x, counts, context_fn=self.context_fn, draws=True)

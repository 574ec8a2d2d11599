"""The router of one layer: a linear score per expert, frozen, adapted by LoRA or trained; in float32 on request."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.start_values import generator_of, uniform_factor

RouterMode = Literal["frozen", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """The router's training mode and the precision of its scores; r and alpha are used in mode "lora" only."""

    mode: RouterMode = "frozen"
    r: int = 8
    alpha: float = 16.0
    float32: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("frozen", "lora", "full"):
            raise ValueError(f"moe.router.mode must be one of frozen, lora, full, got {self.mode!r}")
        if self.mode == "lora" and self.r < 1:
            raise ValueError(f"moe.router.r must be at least 1 in mode lora, got {self.r}")


class Router(nn.Module):
    """Scores tokens: logits_TE = x W^T, plus (alpha / r) (x A^T) B^T in mode "lora".

    With `float32` the product is computed in float32 whatever the model's dtype; a frozen weight is then *stored* in
    float32 too. A trained weight is stored in the engine's dtype with a float32 master copy, like every other trained
    weight. While the router trains, `base_weight` keeps the weight it started from, for the agreement statistic.
    """

    weight: Tensor
    base_weight: Tensor | None

    def __init__(
        self,
        *,
        name: str,
        num_experts: int,
        hidden: int,
        options: RouterOptions,
        resident: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.options = options
        self.seed = seed
        self.is_adapted = True  # False scores like the base, for comparison
        trained = options.mode == "full"
        weight_dtype = torch.float32 if options.float32 and not trained else dtype
        weight = torch.empty(num_experts, hidden, dtype=weight_dtype, device=device)
        if trained or not (resident or options.float32):
            # an engine casts parameters to its dtype, never buffers: a frozen float32 weight has to be one
            self.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("base_weight", torch.empty_like(weight) if trained else None, persistent=False)
        if options.mode == "lora":
            self.lora_A = nn.Parameter(torch.empty(options.r, hidden, dtype=dtype, device=device))
            self.lora_B = nn.Parameter(torch.empty(num_experts, options.r, dtype=dtype, device=device))
            if not weight.is_meta:
                self.init_lora()

    @torch.no_grad()
    def init_lora(self, *, b_std: float = 0.0) -> None:
        """Fill the factors from (seed, name), equal on every rank; B is zero unless b_std is set (in tests)."""
        if self.options.mode != "lora":
            return
        generator = generator_of(self.seed, self.name)
        self.lora_A.copy_(uniform_factor(self.lora_A.shape, generator))
        self.lora_B.copy_(torch.randn(self.lora_B.shape, generator=generator) * b_std)

    @torch.no_grad()
    def keep_base(self) -> None:
        """Store the current weight as the base that agreement is measured against; call this after loading."""
        if self.base_weight is not None:
            self.base_weight.copy_(self.weight)

    def forward(self, x_TD: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
        """Return logits_TE, in float32 or the dtype of x, and the base's choice [T, K] while the router trains."""
        dtype = torch.float32 if self.options.float32 else x_TD.dtype
        x_TD = x_TD.to(dtype)
        if not self.is_adapted:
            weight = self.weight if self.base_weight is None else self.base_weight
            return F.linear(x_TD, weight.to(dtype)), None
        logits_TE = F.linear(x_TD, self.weight.to(dtype))
        base_TE = logits_TE
        if self.options.mode == "lora":
            thin = F.linear(x_TD, self.lora_A.to(dtype)) * (self.options.alpha / self.options.r)
            logits_TE = logits_TE + F.linear(thin, self.lora_B.to(dtype))
        if self.options.mode == "frozen" or not self.training:
            return logits_TE, None
        with torch.no_grad():
            if self.base_weight is not None:
                base_TE = F.linear(x_TD, self.base_weight.to(dtype))
            return logits_TE, base_TE.topk(top_k).indices

    def extra_repr(self) -> str:
        """Describe the router and how it trains."""
        return f"{self.name}, {self.options}"

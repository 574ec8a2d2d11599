"""AdamW on the engine's flat masters. Its moments may be in bfloat16, or wait in host memory between steps.

The arithmetic is torch's fused kernel in float32 in every case. Moments that are stored in another way are brought back
for it piece by piece, so a step needs little more memory than it updates.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from finetune.ranks.engine_sizes import UPDATED

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW; `moments` is the type of the stored moments, `offload` whether they wait in host memory."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self._moments, self._offload = moments, offload

    def state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the state of a flat tensor; before its first step, it is created here."""
        state: dict[str, Tensor] = self.state[flat]
        if not state:
            place = torch.device("cpu") if self._offload else flat.device
            pinned = self._offload and flat.is_cuda
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {
                name: torch.zeros(flat.shape, dtype=self._moments, device=place, pin_memory=pinned) for name in MOMENTS
            }
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every flat tensor that has a gradient."""
        if self._moments is torch.float32 and not self._offload:
            done: float | None = super().step(closure)
            return done
        assert closure is None, "the engine passes none"
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update(flat, group)
                    if self._offload and flat.is_cuda:  # a checkpoint may read the host's copies next
                        torch.cuda.current_stream(flat.device).synchronize()
        return None

    def _update(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self.state_of(flat)
        steps = state["step"]
        for first in range(0, flat.numel(), UPDATED):
            piece = slice(first, first + UPDATED)
            stored = [state[name][piece] for name in MOMENTS]
            mean, square = (tensor.to(flat.device, torch.float32, non_blocking=True, copy=True) for tensor in stored)
            count = steps.clone()  # the kernel adds the step to it, and would once for each piece
            adamw(
                [flat[piece]],
                [flat.grad[piece]],  # type: ignore[index]  # the caller has looked
                [mean],
                [square],
                [],
                [count],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for tensor, new in zip(stored, (mean, square), strict=True):
                tensor.copy_(new, non_blocking=True)
        steps += 1

"""Load balancing of the router without keeping any logits: the loss exists only as the gradient it adds in backward.

For layer l and micro-batch m, over its valid tokens t: f_e is the share of the top-k choices that fell on expert e,
P_e the mean probability of e, and the balance value is E * sum_e f_e P_e: 1 for an even load, E / top-k at worst.
The value of an optimiser step is the mean over the layers of the mean over the micro-batches, weighted by their valid
tokens N_m:

    value = 1/L sum_l sum_m N_m / N_step * E sum_e f_e P_e        z = 1/L sum_l 1/N_step sum_t logsumexp(logits_t)^2

In mode `global` the m-th micro-batches of all ranks count as one, and their counts are summed over the ranks. In
`micro` each rank's micro-batch stands alone, with the f of its own tokens (for a row in slices: of all its slices);
the mean over m then runs over the micro-batches of all ranks.
f has no gradient, so N_m cancels, and every valid token gets the same gradient:

    d value / d p_te = E f_e / (N_step L)                          d z / d logit_te = 2 logsumexp_t p_te / (N_step L)

so only E counts per layer come from other ranks; they are under way from the forward until the backward needs them.
Each rank injects its tokens' gradient times the number of ranks (`local_sum * world / N_step`): the engine's mean over
the ranks then gives the exact gradient, whatever the engine's accumulation count or the split of the tokens.
The engine never sees these terms, so it cannot scale them, not even by a float16 loss scale.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from moe.config import BalanceMode
from moe.expert_load import StepLoad, StepTotals, step_load


def _check_active(totals: StepTotals, *, value_needed: bool) -> None:
    called, injected = totals.called_L.tolist(), totals.injected_L.tolist()
    if not any(called):
        raise ValueError(
            "A balance or z loss is on, but no layer's routing records a gradient: the router is frozen and nothing "
            "before it trains, or its scores were detached. Train the router, or set moe.balance: off and "
            "moe.z_coefficient: 0."
        )
    for layer, (forwards, backwards) in enumerate(zip(called, injected, strict=True)):
        if forwards != backwards:
            raise ValueError(
                f"The balance and z losses of layer {layer} ran {forwards:g} times forward and {backwards:g} times "
                f"backward, over all ranks. The layer must use the probabilities that it gets back, and every "
                f"micro-batch needs one backward before finish_step."
            )
    for layer, value in enumerate(totals.balance_L.tolist()):
        if value_needed and not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"The balance value of layer {layer} must be a finite number above 0, got {value}: the router's "
                f"probabilities are not finite. Look for the first layer with an output that is not finite."
            )


class _MicroBatch:
    """The counts of one micro-batch's layers, and the all-reduces that are still under way."""

    def __init__(
        self, *, valid_T: Tensor | None, groups_DT: Tensor | None, layers: int, experts: int, device: torch.device
    ) -> None:
        self.given_valid_T = valid_T
        self.groups_DT = groups_DT
        self.counts_LE = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self.all_counts_LE = self.counts_LE  # becomes a tensor of its own where counts are summed over ranks
        self.probs_sum_LE = torch.zeros(layers, experts, device=device)
        self.z_L = torch.zeros(layers, device=device)
        self.seen: set[int] = set()
        self.under_way: dict[int, dist.Work] = {}

    def valid_T(self, probs_TE: Tensor) -> Tensor:
        if self.given_valid_T is None:
            return torch.ones(probs_TE.shape[0], dtype=torch.bool, device=probs_TE.device)
        if len(self.given_valid_T) != len(probs_TE):
            raise ValueError(
                f"The router scored {len(probs_TE)} tokens, but the mask given to start_micro_batch has "
                f"{len(self.given_valid_T)} entries. Give one entry for each token that this rank's router sees."
            )
        return self.given_valid_T

    def share_E(self, layer: int) -> Tensor:
        """Return each expert's share of the layer's choices; waits for the other ranks' counts."""
        if layer in self.under_way:
            self.under_way.pop(layer).wait()
        counts_E = self.all_counts_LE[layer].double()
        return counts_E / counts_E.sum().clamp(min=1)

    def values_L(self) -> Tensor:
        """Return E * sum_e f_e * (sum of p_e over this rank's valid tokens) for each layer."""
        while self.under_way:
            self.under_way.popitem()[1].wait()
        counts_LE = self.all_counts_LE.double()
        share_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)
        return share_LE.shape[1] * (share_LE * self.probs_sum_LE).sum(1)


class _Inject(torch.autograd.Function):
    """Passes the probabilities through; adds the gradients of the balance and z values in backward."""

    @staticmethod
    def forward(
        ctx: Any, probs_TE: Tensor, logits_TE: Tensor, balance: "Balance", micro: _MicroBatch, layer: int
    ) -> Tensor:
        ctx.balance = balance
        ctx.micro = micro
        ctx.layer = layer
        ctx.logits_dtype = logits_TE.dtype
        if balance.z_coefficient:  # softmax keeps the probabilities for its own backward: no further copy
            ctx.save_for_backward(probs_TE, torch.logsumexp(logits_TE.float(), -1))
        return probs_TE.view_as(probs_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        balance = ctx.balance
        micro = ctx.micro
        layer = ctx.layer
        balance.injected[layer] += 1
        valid_T = micro.valid_T(grad_TE)
        grad_logits_TE = None
        if balance.z_coefficient and ctx.needs_input_grad[1]:
            probs_TE, lse_T = ctx.saved_tensors
            grad_T = 2 * balance.z_coefficient * balance.gradient_scale * lse_T * valid_T
            grad_logits_TE = (grad_T[:, None] * probs_TE).to(ctx.logits_dtype)
        if balance.mode != "off":
            grad_E = balance.coefficient * balance.gradient_scale * balance.experts * micro.share_E(layer)
            grad_TE = grad_TE + valid_T[:, None] * grad_E.to(grad_TE.dtype)
        return grad_TE, grad_logits_TE, None, None, None


class Balance:
    """The balance and z losses of one model, and the load of its experts; made once and called by each MoE layer.

    For each optimiser step: `start_step`; for each micro-batch `start_micro_batch`, forward, backward; `finish_step`.
    Outside a step, and where no gradient is recorded, a call does nothing. The ranks of `group` (None: all) hold
    different tokens and must go through the same micro-batches and layers in the same order: `finish_step` is
    collective in all modes, and in mode `global` so is each layer of each micro-batch. Recompute must be non-reentrant.
    """

    def __init__(
        self,
        *,
        mode: BalanceMode,
        coefficient: float,
        z_coefficient: float,
        layers: int,
        experts: int,
        top_k: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.mode = mode
        self.coefficient, self.z_coefficient = coefficient, z_coefficient
        self.layers = layers
        self.experts = experts
        self.top_k = top_k
        self._device = device
        self._group = group
        self._row_group: dist.ProcessGroup | None = None
        self._world = dist.get_world_size(group) if dist.is_initialized() else 1
        self._step_tokens: int | None = None
        self._micro: _MicroBatch | None = None

    @property
    def gradient_scale(self) -> float:
        """The factor of every token's gradient: the number of ranks over the step's tokens and the layers."""
        assert self._step_tokens is not None, "backward after finish_step"
        return self._world / (self._step_tokens * self.layers)

    def share_rows(self, group: dist.ProcessGroup | None) -> None:
        """Treat these ranks' micro-batches as one in mode `micro` too: from now on they hold slices of one row."""
        self._row_group = group

    def start_step(self, step_tokens: int, *, groups: int = 0) -> None:
        """Begin a step with `step_tokens` valid tokens over all micro-batches and ranks; drop an unfinished step.

        With `groups`, the load is also counted for each of that many groups of tokens.
        """
        if step_tokens < 1:
            raise ValueError(
                f"A step has {step_tokens} valid tokens over all ranks: nothing to train on. Skip the step."
            )
        self._step_tokens = step_tokens
        self._micro = None
        # per layer, how many forwards recorded a gradient and how many backwards added one
        self.called, self.injected = [0] * self.layers, [0] * self.layers
        self.totals = StepTotals.zeros(layers=self.layers, experts=self.experts, groups=groups, device=self._device)

    def start_micro_batch(self, valid_T: Tensor | None, groups_DT: Tensor | None = None) -> None:
        """Begin a micro-batch; `valid_T` is False for padding, in the order in which this rank's routers see tokens.

        `groups_DT` numbers the group of each token in D divisions, such as by kind and by source. A step that counts
        groups needs it.
        """
        if self._step_tokens is None:
            raise ValueError("start_micro_batch outside of a step: call start_step with the step's valid tokens first.")
        self.end_micro_batch()
        if valid_T is not None:
            valid_T = valid_T.reshape(-1).to(self._device, torch.bool)
        self._micro = _MicroBatch(
            valid_T=valid_T, groups_DT=groups_DT, layers=self.layers, experts=self.experts, device=self._device
        )

    def __call__(
        self,
        layer: int,
        logits_TE: Tensor,
        probs_TE: Tensor,
        topk_TK: Tensor,
        base_topk_TK: Tensor | None = None,
    ) -> Tensor:
        """Return the probabilities with the losses attached; count the choices and compare them with the base's."""
        if self._step_tokens is None or not torch.is_grad_enabled():
            return probs_TE
        micro = self._micro
        if micro is None:
            raise ValueError("A layer routed tokens before start_micro_batch: call it before each forward of a step.")
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and layer not in micro.seen:
            raise ValueError(
                f"Layer {layer} is recomputed in backward, but its forward recorded nothing in this micro-batch. "
                f"Either activation checkpointing is reentrant (set use_reentrant=False), or start_micro_batch was "
                f"called before the backward of the micro-batch before it."
            )
        if not in_backward:
            if layer in micro.seen:
                raise ValueError(
                    f"Layer {layer} ran twice in one micro-batch: call start_micro_batch before each forward."
                )
            self._observe(micro, layer, logits_TE, probs_TE, topk_TK, base_topk_TK)
        if self.mode == "off" and not self.z_coefficient:
            return probs_TE
        return _Inject.apply(probs_TE, logits_TE, self, micro, layer)  # type: ignore[no-untyped-call, no-any-return]  # torch's stub

    @torch.no_grad()
    def _observe(
        self,
        micro: _MicroBatch,
        layer: int,
        logits_TE: Tensor,
        probs_TE: Tensor,
        topk_TK: Tensor,
        base_topk_TK: Tensor | None,
    ) -> None:
        micro.seen.add(layer)
        # Selective recompute pairs the kept results with the operations by their order. These operations run in forward
        # only: if its mode saw them, they would shift the pairs of the layer's own operations.
        with _disable_current_modes():
            valid_T = micro.valid_T(probs_TE)
            chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(
                1, topk_TK, valid_T[:, None].expand_as(topk_TK)
            )
            counts_E = torch.sum(chosen_TE, 0, out=micro.counts_LE[layer])
            invalid_T = ~valid_T
            z_T = torch.logsumexp(logits_TE.float(), -1).square()
            torch.sum(z_T.masked_fill_(invalid_T, 0), 0, out=micro.z_L[layer])
            torch.sum(probs_TE.masked_fill(invalid_T[:, None], 0), 0, out=micro.probs_sum_LE[layer])
            if base_topk_TK is not None:
                self.totals.agreed_L[layer] += chosen_TE.gather(1, base_topk_TK).sum()
                self.totals.compared_L[layer] += counts_E.sum()
            if micro.groups_DT is not None:
                self._count_groups(layer, micro.groups_DT, topk_TK, valid_T)
        self.called[layer] += probs_TE.requires_grad
        if self._world > 1 and (self.mode == "global" or (self.mode == "micro" and self._row_group is not None)):
            if micro.all_counts_LE is micro.counts_LE:
                micro.all_counts_LE = torch.zeros_like(micro.counts_LE)
            counts_E = micro.all_counts_LE[layer].copy_(counts_E)
            over = self._group if self.mode == "global" else self._row_group
            work = dist.all_reduce(counts_E, group=over, async_op=True)
            assert work is not None
            micro.under_way[layer] = work

    def _count_groups(self, layer: int, groups_DT: Tensor, topk_TK: Tensor, valid_T: Tensor) -> None:
        """Add the choices of each group's valid tokens; sums of ones in float64 are exact in any order."""
        bins_DTK = groups_DT[..., None] * self.experts + topk_TK
        ones_DTK = valid_T.to(torch.float64)[:, None].expand(bins_DTK.shape)
        self.totals.counts_LGE[layer].view(-1).scatter_add_(0, bins_DTK.reshape(-1), ones_DTK.reshape(-1))

    def end_micro_batch(self) -> None:
        """Add the micro-batch's counts to the totals; the next micro-batch and the end of the step call this too."""
        if self._micro is not None:
            self.totals.counts_LE += self._micro.counts_LE
            self.totals.z_L += self._micro.z_L
            self.totals.balance_L += self._micro.values_L()
        self._micro = None

    def finish_step(self) -> StepLoad:
        """Return the step's load, and check that the losses act; every rank must call this.

        Call it after the last backward and before the update.
        """
        if self._step_tokens is None:
            raise ValueError("finish_step was called without start_step. Call start_step first.")
        self.end_micro_batch()
        self.totals.called_L += torch.tensor(self.called, device=self._device)
        self.totals.injected_L += torch.tensor(self.injected, device=self._device)
        if self._world > 1:
            dist.all_reduce(self.totals.packed_LX, group=self._group)
        packed_LX = self.totals.packed_LX.cpu()  # the step's one wait for the device
        totals = StepTotals(packed_LX, experts=self.experts)
        step_tokens, self._step_tokens = self._step_tokens, None
        load = step_load(totals, top_k=self.top_k, step_tokens=step_tokens)
        if self.mode != "off" or self.z_coefficient:
            _check_active(totals, value_needed=self.mode != "off")
        return load

"""Load statistics: how many tokens the experts of each layer received in one optimiser step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _normalised_entropy(counts: Sequence[int]) -> float:
    shares = [count / sum(counts) for count in counts if count]
    return math.fsum(-share * math.log(share) for share in shares) / math.log(len(counts))


def step_load(totals: "StepTotals", *, top_k: int, step_tokens: int) -> "StepLoad":
    """Return a step's load from its totals over all ranks; raise ValueError if they do not add up to `step_tokens`."""
    for layer, choices in enumerate(totals.counts_LE.sum(1).tolist()):
        if choices != top_k * step_tokens:
            raise ValueError(
                f"Layer {layer} routed {choices / top_k:g} valid tokens in this step, over all ranks, but start_step "
                f"was given {step_tokens}. If there are fewer, a part of the model ran in eval mode or under no_grad, "
                f"or not at all; otherwise the masks given to start_micro_batch differ from what start_step counted."
            )
    compared = bool(totals.compared_L.all())
    return StepLoad(
        counts=tuple(tuple(int(count) for count in counts) for counts in totals.counts_LE.tolist()),
        balance=tuple((totals.balance_L / step_tokens).tolist()),
        z=tuple((totals.z_L / step_tokens).tolist()),
        agreement=tuple((totals.agreed_L / totals.compared_L).tolist()) if compared else None,
        groups=tuple(totals.counts_LGE.transpose(0, 1).to(torch.int64).tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """One optimiser step over all ranks and valid tokens; every tuple has one entry per layer."""

    counts: tuple[tuple[int, ...], ...]  # [layers][experts]: how many tokens chose the expert
    balance: tuple[float, ...]  # E * sum f P, weighted by tokens over the micro-batches; 1 is even, E / top-k is worst
    z: tuple[float, ...]  # mean squared logsumexp of the router logits
    agreement: tuple[float, ...] | None  # share of the top-k choices that the base router makes too
    groups: tuple[Sequence[Sequence[int]], ...] = ()  # the counts of each group of tokens, if they were given

    @property
    def max_over_mean(self) -> tuple[float, ...]:
        """Load of the busiest expert, as a multiple of the mean."""
        return tuple(max(counts) * len(counts) / sum(counts) for counts in self.counts)

    @property
    def entropy(self) -> tuple[float, ...]:
        """Entropy of the load: 1 if even, log(top-k) / log(E) if every token goes to the same experts."""
        return tuple(_normalised_entropy(counts) for counts in self.counts)

    @property
    def dead(self) -> tuple[int, ...]:
        """Number of experts that received no token."""
        return tuple(sum(count == 0 for count in counts) for counts in self.counts)

    # The figures of a metrics line, under the names they have there.

    @property
    def loss_balance(self) -> float:
        """The balance value, mean over the layers, before its coefficient."""
        return _mean(self.balance)

    @property
    def loss_z(self) -> float:
        """The z value, mean over the layers, before its coefficient."""
        return _mean(self.z)

    @property
    def expert_load_max_over_mean(self) -> float:
        """Load of the busiest expert over the mean, in the worst layer."""
        return max(self.max_over_mean)

    @property
    def expert_load_entropy(self) -> float:
        """Entropy of the load in the worst layer."""
        return min(self.entropy)

    @property
    def experts_dead(self) -> int:
        """Number of experts without a token, over all layers."""
        return sum(self.dead)

    @property
    def router_agreement(self) -> float | None:
        """Agreement with the base router, mean over the layers; None if no base router was run."""
        return None if self.agreement is None else _mean(self.agreement)


class StepTotals:
    """Sums over the layers of one step: views of one tensor, so that one all-reduce and one copy move all of them."""

    SUMS = 6

    def __init__(self, packed_LX: Tensor, *, experts: int) -> None:
        self.packed_LX = packed_LX
        self.counts_LE = packed_LX[:, :experts]
        layers, width = packed_LX.shape
        self.counts_LGE = packed_LX[:, experts : -self.SUMS].view(layers, (width - self.SUMS) // experts - 1, experts)
        # The balance and z values are sums over valid tokens. The base router makes `agreed` of the `compared` choices
        # too. `called` counts the forwards that recorded a gradient, `injected` the backwards that added one.
        sums_L6 = packed_LX[:, -self.SUMS :]
        self.balance_L, self.z_L, self.agreed_L, self.compared_L, self.called_L, self.injected_L = sums_L6.unbind(1)

    @classmethod
    def zeros(cls, *, layers: int, experts: int, groups: int, device: torch.device) -> "StepTotals":
        """Return the totals before the first layer; float64 holds every count exactly."""
        width = experts * (1 + groups) + cls.SUMS
        return cls(torch.zeros(layers, width, dtype=torch.float64, device=device), experts=experts)

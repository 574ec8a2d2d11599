"""The `moe:` section. Loads no torch."""

from dataclasses import dataclass
from typing import Literal

BalanceMode = Literal["off", "micro", "global"]

CHUNK_BYTES = 1 << 30
"""Bytes that a call of the experts allocates for intermediates at a time; more rows are computed in more chunks."""
KEEP_BYTES = 4 << 30
"""Most bytes of the gate_up output that a call keeps; with more rows, backward computes it again."""
LEAST_HOST_BYTES = 1 << 20
"""Bytes below which a tensor stays on the device when others go to the host: moving it costs more than it frees."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routing, dispatch and balance of the mixture-of-experts layers."""

    dispatch: Literal["all_to_all", "deepep"] = "all_to_all"
    """The method that sends tokens to experts on other ranks. `all_to_all`: torch's collective, which works everywhere.
    `deepep`: the kernels of the package DeepEP, which you have to build.

    Change: to `deepep` when traffic between nodes decides the time of a step, in bfloat16 on GPUs.
    With: `parallel.ep` (1: nothing travels; `deepep` is refused), `parallel.recompute` (`deepep` cannot take
    `selective`), `parallel.tile_tokens` (`deepep` cannot take tiles).
    """
    router_float32: bool = False
    """Whether the router scores tokens in float32, whatever `model.dtype` is. False scores as the base was trained and
    as servers do.

    Change: to true when the router trains and its choices flicker; compare with your server, which may round.
    With: `model.dtype`, `adapters.router.mode`.
    """
    balance: BalanceMode = "off"
    """Whether a loss pulls the router towards an even load of the experts. `off`: the load is only logged. `micro`: the
    load is balanced within each rank's row. `global`: within the rows of all ranks together, so that experts may
    specialise by topic.

    Change: to `global` when the router trains. Small learning rates and few steps seldom need it.
    With: `adapters.router.mode` (with a frozen router it has little effect, and a warning says so),
    `moe.balance_coefficient`.
    """
    balance_coefficient: float = 1e-3
    """The factor of the balance loss, which is 1 for an even load, whatever the number of experts per token.

    Change: raise it when `loss_balance` in `metrics.jsonl` keeps growing, lower it when the loss suffers.
    With: `moe.balance` (with `off` it has no effect, and another value is an error).
    """
    z_coefficient: float = 0.0
    """The factor of the z loss, the mean squared logsumexp of the router's scores, which keeps them small. 0: no z
    loss.

    Change: to about 1e-3 when the router trains and its scores grow.
    With: `moe.balance` (independent: this works in every mode), `adapters.router.mode`.
    """

"""The `moe:` section. Loads no torch."""

from dataclasses import dataclass
from typing import Literal

BalanceMode = Literal["off", "micro", "global"]

CHUNK_BYTES = 1 << 30
"""Bytes that a call of the experts allocates for intermediates at a time; more rows are computed chunk by chunk."""
KEEP_BYTES = 4 << 30
"""Bytes of the gate_up output that a call keeps at most; with more rows it is computed again in backward."""
LEAST_HOST_BYTES = 1 << 20
"""Smaller tensors stay on the device when others go to the host: the way there costs more than they take."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routing, dispatch and balance of the mixture-of-experts layers."""

    dispatch: Literal["all_to_all", "deepep"] = "all_to_all"
    router_float32: bool = False  # score in float32 whatever model.dtype is
    # the load is balanced within each rank's micro-batch, or within the micro-batches of all ranks together
    balance: BalanceMode = "off"
    balance_coefficient: float = 1e-3  # times the balance value, which is 1 for an even load at any top-k
    z_coefficient: float = 0.0  # times the mean squared logsumexp of the router logits; works in every balance mode

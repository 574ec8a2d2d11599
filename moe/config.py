"""The `moe:` section. Loads no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routing, dispatch and balance of the mixture-of-experts layers."""

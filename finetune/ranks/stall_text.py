"""The message of a rank that ends because it stalled: what it waited for, where the others were, and the limit."""

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 4


def stall_text(
    kind: str, here: Mapping[str, Any], limit: float, *, reading: Sequence[str], others: Sequence[str], is_busy: bool
) -> str:
    """Describe a rank that has been `here` for its limit; `is_busy`: it works on a file of its own."""
    if kind == "data":
        return (
            f"data stall: step {here['step']} has waited {limit:g} s for data. Being read: "
            f"{'; '.join(reading) or 'nothing in this process'}. Look at these samples with `moetune shards check`; "
            f"data.stall_seconds is the limit"
        )
    last_heard = f"Last heartbeats of other ranks: {'; '.join(others) or 'none'}. run.stall_seconds is the limit"
    if kind == "together":
        return (
            f"the ranks have not come together within {limit:g} s at the {here['stage']} of the run: some are missing, "
            f"or messages between them do not arrive. Run `moetune doctor --cluster` on the same nodes. {last_heard}"
        )
    samples = ", ".join(here["samples"][:SHOWN]) + (", ..." if len(here["samples"]) > SHOWN else "")
    cause = "No rank is writing" if kind == "save" else "This rank has its data"
    cause += ", and another rank has not arrived"
    if kind == "save" and is_busy:
        cause = "This rank's own files have not grown: look at its disk"
    return (
        f"collective stall: step {here['step']} has been stuck for {limit:g} s in {here['stage']}"
        + (f" of samples {samples}" if samples else "")
        + f". {cause}. {last_heard}"
    )

"""The message of a rank that ends because it stood still: what it waited for, where the others were, which limit."""

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
            f"{'; '.join(reading) or 'nothing of this process'}. Look at these samples with `moetune shards check`; "
            f"data.stall_seconds is the limit"
        )
    last_heard = f"The others last said: {'; '.join(others) or 'none has written'}. run.stall_seconds is the limit"
    if kind == "together":
        return (
            f"the ranks have not come together for {limit:g} s at the {here['stage']} of the run: some are missing, or "
            f"messages between them do not arrive (`moetune doctor --cluster` on the same nodes looks). {last_heard}"
        )
    samples = ", ".join(here["samples"][:SHOWN]) + (", ..." if len(here["samples"]) > SHOWN else "")
    cause = "No rank writes any more" if kind == "save" else "This rank has its data"
    cause += "; some other rank does not come"
    if kind == "save" and is_busy:
        cause = "This rank's own files have not grown: look at its disk"
    return (
        f"collective stall: step {here['step']} has stood for {limit:g} s in {here['stage']}"
        + (f" of samples {samples}" if samples else "")
        + f". {cause}. {last_heard}"
    )

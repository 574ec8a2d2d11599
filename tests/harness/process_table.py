"""The state of processes that a test has started."""

import re
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait for whoever reaps it."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and not re.search(r"^State:\tZ", status.read_text(), re.MULTILINE)

"""Causes and remedies of errors of the machine and of libraries, in place of their long texts. Loads no torch."""

import re
from textwrap import shorten

ONWARD = "The same command continues from the last save"
LINES = 4
"""The number of lines of a message that are shown; the log has them all."""
WIDTH = 200
"""The number of characters that are shown of the line with the cause."""
GPU_LOST = (
    "uncorrectable",
    "no CUDA-capable device",
    "busy or unavailable",
    "unknown error",
    "unspecified launch failure",
    "hardware stack error",
    "system not yet initialized",
    "GPU is lost",
)
"""Texts of CUDA's errors that mean a failed or lost GPU; its other errors come from a program."""
CURES = (
    (
        r"No space left on device|Disk quota exceeded",
        f"The disk is full: free space on the disk of the run's folder or of data.cache_dir. {ONWARD}",
    ),
    (
        r"Read-only file system",
        f"The disk was made read-only, as the kernel does after a disk error: look at dmesg. {ONWARD}",
    ),
    (
        r"File too large",
        f"A file reached the limit of its size, set by ulimit -f or by the file system: raise it. {ONWARD}",
    ),
    (
        r"(CUDA|HIP) out of memory",
        f"The GPU's memory is full: lower data.tokens_per_pack, or set parallel.recompute=layer; `moetune plan` shows "
        f"what fits. {ONWARD}",
    ),
    (
        r"can't allocate memory|Cannot allocate memory|^MemoryError",
        f"Memory is full: lower data.tokens_per_pack, data.workers or --ranks; `moetune plan` shows what a rank needs. "
        f"{ONWARD}",
    ),
    (
        rf"CUDA error: .*({'|'.join(GPU_LOST)})",
        f"The GPU has failed or is gone: look at `nvidia-smi` and dmesg (Xid), then reset or replace the GPU. {ONWARD}",
    ),
    (
        r"CUDA error: ",
        "An operation on the GPU failed, perhaps an earlier one than the traceback shows: start again with "
        "CUDA_LAUNCH_BLOCKING=1 to find it",
    ),
)
"""Patterns of error texts, each with its cause and remedy."""


def told(text: str, *, place: str) -> str:
    """Return an error's text for the user, in at most LINES lines; `place` names the device of the rank."""
    for pattern, cure in CURES:
        if found := re.search(pattern, text, re.MULTILINE):
            start = text.rfind("\n", 0, found.start()) + 1
            line = text[start:].splitlines()[0]
            where = f" ({place})" if "CUDA" in pattern else ""
            return f"{shorten(line.rstrip('.'), WIDTH, placeholder=' ...')}{where}.\n{cure}"
    lines = text.splitlines()
    return text if len(lines) <= LINES else "\n".join([*lines[: LINES - 1], "..."])

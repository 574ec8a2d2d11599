"""Turns errors of the machine and of libraries into a cause and a cure of a few lines. No torch."""

import re
from textwrap import shorten

ONWARD = "The same command goes on from the last save"
LINES = 4
"""Lines of a message that are shown; the log has all of them."""
WIDTH = 200
"""Characters that are shown of the line that tells the cause."""
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
"""Phrases of CUDA for a GPU that has failed or is gone; its other errors are errors of a program."""
CURES = (
    (
        r"No space left on device|Disk quota exceeded",
        f"The disk is full: make room on that of the run's folder, or of data.cache_dir. {ONWARD}",
    ),
    (
        r"Read-only file system",
        f"The disk was made read-only, as the kernel does after an error of the disk: look at dmesg. {ONWARD}",
    ),
    (
        r"File too large",
        f"The file system, or a limit on files (ulimit -f), takes no larger file: raise it. {ONWARD}",
    ),
    (
        r"(CUDA|HIP) out of memory",
        f"The GPU's memory is full: lower data.tokens_per_pack, or set parallel.recompute=layer; `moetune plan` says "
        f"what fits. {ONWARD}",
    ),
    (
        r"can't allocate memory|Cannot allocate memory|^MemoryError",
        f"Memory is full: lower data.tokens_per_pack, data.workers or --ranks; `moetune plan` says what a rank takes. "
        f"{ONWARD}",
    ),
    (
        rf"CUDA error: .*({'|'.join(GPU_LOST)})",
        f"The GPU has failed or is gone: look at `nvidia-smi` and at dmesg (Xid), and reset or replace it. {ONWARD}",
    ),
    (
        r"CUDA error: ",
        "An operation on the GPU failed, maybe an earlier one than the traceback names: start again with "
        "CUDA_LAUNCH_BLOCKING=1 to have the right one",
    ),
)
"""A pattern of an error's text, and what to do."""


def told(text: str, *, place: str) -> str:
    """Return an error's text as people read it, in LINES lines at most; `place` is where the rank computes."""
    for pattern, cure in CURES:
        if found := re.search(pattern, text, re.MULTILINE):
            start = text.rfind("\n", 0, found.start()) + 1
            line = text[start:].splitlines()[0]
            where = f" ({place})" if "CUDA" in pattern else ""
            return f"{shorten(line.rstrip('.'), WIDTH, placeholder=' ...')}{where}.\n{cure}"
    lines = text.splitlines()
    return text if len(lines) <= LINES else "\n".join([*lines[: LINES - 1], "..."])

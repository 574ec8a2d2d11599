"""The flight recorder: the last collectives of each rank, written when a rank ends because it stalled.

torch records gloo and NCCL separately. The files have torch's own format, so that its `flight_recorder` tool reads
them: flight-7 is NCCL's, which its watchdog may also write, and flight-gloo-7 is gloo's.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

from finetune.ranks.flight_reading import GLOO, NCCL

KEPT = 2000
"""The number of collectives to keep; a step of a large model has some thousand."""
RECORDERS = {NCCL: "_dump_nccl_trace", GLOO: "_dump_fr_trace"}
"""torch's functions, by the first part of the file's name; a build of torch without NCCL lacks the first."""


def record_flight(folder: Path) -> None:
    """Let torch record, and write next to the logs if NCCL's own watchdog fires; call this before the first group."""
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, str((folder / NCCL).absolute()))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(KEPT))


def forget_flight(folder: Path, rank: int) -> None:
    """Remove the records of the start before."""
    for name in RECORDERS:
        (folder / f"{name}{rank}").unlink(missing_ok=True)


def write_flight(folder: Path, rank: int) -> None:
    """Write the recorded collectives; any thread may call this while the main thread waits in one."""
    for name, function in RECORDERS.items():
        dump: Callable[..., bytes] | None = getattr(_distributed_c10d, function, None)
        if dump is None:
            continue
        # a pickle is safe here: this process has just made it; and torch's own tool reads pickles
        record = pickle.loads(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
        if record.get("entries"):
            record["pg_config"] = _groups() or record["pg_config"]
            (folder / f"{name}{rank}").write_bytes(pickle.dumps(record))


def _groups() -> dict[str, dict[str, str]]:
    """Return the ranks of each group, in the form of NCCL's recorder; gloo's recorder omits them."""
    world = dist.distributed_c10d._world
    return {
        name: {"name": name, "desc": group.group_desc, "ranks": json.dumps(sorted(world.pg_group_ranks[group]))}
        for group, name in world.pg_names.items()
    }

"""Ranks of one benchmark on this machine: started, joined over a file, their answers collected."""

import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def on_ranks(world: int, run: Callable[..., Any], *args: Any) -> Sequence[Any]:
    """Return what `run(*args)` returned on each rank; it is a module's own function, called with gloo up."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            _rank, args=(world, run, args, folder), nprocs=world, start_method="spawn"
        )
        # our own children's answers
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def _rank(rank: int, world: int, run: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    os.dup2(2, 1)  # DeepSpeed logs to stdout, which may be a record
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(run(*args)))
    dist.barrier()
    dist.destroy_process_group()

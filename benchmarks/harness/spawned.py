"""Run a function on several ranks of this machine, which meet over a file, and collect the results."""

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def on_ranks(world: int, run: Callable[..., Any], *args: Any, accelerator: str = "cpu") -> Sequence[Any]:
    """Return the result of `run(*args)` on each rank; `run` is a module-level function, called with gloo or NCCL up."""
    with tempfile.TemporaryDirectory() as folder, _environment(DS_ACCELERATOR=accelerator):
        start_processes(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            _rank, args=(world, run, args, folder, accelerator), nprocs=world, start_method="spawn"
        )
        # written by our own children
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for processes started meanwhile: DeepSpeed reads them at its import, before `_rank` runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _rank(rank: int, world: int, run: Callable[..., Any], args: tuple[Any, ...], folder: str, accelerator: str) -> None:
    os.dup2(2, 1)  # DeepSpeed logs to stdout, which may carry a record
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if accelerator == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device is not None else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        device_id=device,
    )
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(run(*args)))
    dist.barrier()
    dist.destroy_process_group()

"""The calls of a run to the accelerator and to torch.distributed, in order, each with its phase and thread.

On a CPU, most of these calls do nothing; on a GPU, they decide which device is used and which communicators exist.
"""

import datetime
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from checkpoint_session import Job, start
from deepspeed.accelerator import get_accelerator

from finetune.ranks.engine import engine_device, start_distributed

MADE = "a process group"
FIRST_LOCAL = 5
"""LOCAL_RANK of rank 0: no rank's device is number 0, so that a rank that does not choose its device is noticed."""


@dataclass(frozen=True, kw_only=True)
class Call:
    phase: str
    thread: str
    what: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Group:
    ranks: tuple[int, ...]
    limit: datetime.timedelta


class Record:
    def __init__(self) -> None:
        self.phase, self.calls = "set-up", list[Call]()

    def add(self, what: str, value: Any = None) -> None:
        thread = threading.current_thread().name.partition("_")[0]
        self.calls.append(Call(phase=self.phase, thread=thread, what=what, value=value))

    def calling(self, name: str, function: Callable[..., Any], shown: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*args: Any, **options: Any) -> Any:
            self.add(name, shown(*args, **options))
            return function(*args, **options)

        return noted


@contextmanager
def recorded() -> Iterator[Record]:
    """Record every call to the accelerator by name and first argument, and the ranks and timeout of every group."""
    record, kind = Record(), type(get_accelerator())
    for name, member in inspect.getmembers_static(kind):
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            setattr(kind, name, record.calling(name, member, lambda _, *args, **__: args[0] if args else None))
        elif isinstance(member, property):
            assert member.fget is not None
            setattr(kind, name, property(record.calling(name, member.fget, lambda _: None)))
    torch_s = dist.distributed_c10d
    torch_s._new_process_group_helper = record.calling(
        MADE,
        torch_s._new_process_group_helper,
        lambda size, rank, ranks, *_, timeout, **__: Group(ranks=tuple(ranks), limit=timeout),
    )
    yield record


def run(rank: int, world: int, base: Path, folder: Path, port: int) -> list[Call]:
    """Set up, step, save asynchronously, save synchronously, restore and step again, in a new process group."""
    dist.destroy_process_group()  # the test's group: this rank starts like one from a launcher
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank + FIRST_LOCAL)}
    with recorded() as record:
        start_distributed()
        engine_device()
        session = start(rank, world, base, Job(folder=folder, ep=world, asynchronous=True))
        record.phase = "step"
        session.train(1)
        record.phase = "save behind"
        session.save()
        session.checkpoints.wait()
        record.phase = "save"
        saved = session.save(wait=True)
        record.phase = "restore"
        session.restore(saved)
        record.phase = "step after"
        session.train(1)
    return record.calls

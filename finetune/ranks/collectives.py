"""Exchanges between ranks outside the model: sums, lists, and checks that all ranks agree."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore

from finetune.ranks.log import listed, ranks_named
from moe.experts import GroupedExperts

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""The timeout of a collective. It is long because one rank may fetch or index terabytes, or write a model, while the
others wait for it. Dead ranks are noticed sooner, by broken connections or by the watch."""


class Preempted(Exception):
    """A signal asked some rank to stop, and all ranks know it: the work in progress is abandoned."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def be_patient(limit: timedelta) -> None:
    """Set the timeout of all groups that are made from now on without one.

    DeepSpeed passes none, and NCCL's groups would end a run after ten minutes. They count from when a collective is
    issued. On a GPU that is long before its turn comes, if rank 0 still writes what the others have sent.
    """
    torch_s = dist.distributed_c10d
    torch_s.default_pg_timeout = torch_s.default_pg_nccl_timeout = limit  # type: ignore[attr-defined]  # not exported


def join_restarted(backend: str, timeout: timedelta, *, device: torch.device | None = None) -> None:
    """Meet the other ranks after an elastic restart, under names that the start before did not use.

    `device` is the device that the group is bound to; None: the device of the tensors in its collectives.

    torchrun keeps one store over its restarts. It still has the addresses of ranks that are gone, and a group that
    reads one of them waits forever. On several machines the counts of restarts may differ. There,
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment gives each restart a store of its own.
    """
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False"
    if not count or has_own_store or world != int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore(f"restart-{count}", TCPStore(address, port, world_size=world, is_master=False))
    dist.init_process_group(backend, rank=rank, world_size=world, store=store, timeout=timeout, device_id=device)


def has_group() -> bool:
    """Return whether there is a process group."""
    return dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums over ranks, in float64; every rank must call this with the same number of values."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def require_no_wish(stop: int, device: torch.device) -> None:
    """Raise Preempted on every rank if a signal has asked any of them to stop; every rank must call this.

    `stop` is the signal that this rank got, 0 for none.
    """
    wish = torch.tensor(stop, dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.all_reduce(wish, op=dist.ReduceOp.MAX)
    if number := int(wish):
        raise Preempted(number)


def gather_numbers(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """Return the values of each rank, in float64; every rank must call this with the same number of values."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(rank_and_world()[1])]
    if len(everyone) == 1:
        return [mine.tolist()]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def barrier() -> None:
    """Wait for every rank; every rank must call this."""
    if dist.is_initialized():
        dist.barrier()


def gather_lists(mine: list[T]) -> list[T]:
    """Return the lists of all ranks, one after the other, the same on each; every rank must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    everyone: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [item for items in everyone for item in items]


def parameter_table(module: nn.Module) -> dict[str, str]:
    """Describe each parameter and buffer by shape, dtype and whether it trains; a partitioned one by its full shape."""
    tensors: list[tuple[str, torch.Tensor, str]]
    tensors = [(name, p, "trained" if p.requires_grad else "frozen") for name, p in module.named_parameters()]
    tensors += [(name, b, "buffer") for name, b in module.named_buffers()]
    return {
        name: f"{tuple(getattr(tensor, 'ds_shape', tensor.shape))} {str(tensor.dtype).removeprefix('torch.')} {kind}"
        for name, tensor, kind in tensors
    }


def require_equal_tables(what: str, table: Mapping[str, str], device: torch.device) -> None:
    """Raise ValueError on every rank, naming the entries, unless all ranks hold the same table in the same order.

    An engine that partitions parameters pairs its collectives by the order of the parameters. If ranks differ, they
    hang, or train on each other's bytes. Every rank must call this.
    """
    rank, world = rank_and_world()
    if world == 1:
        return
    digest = hashlib.sha256(repr(list(table.items())).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine)
    different = [other for other in range(world) if not torch.equal(everyone[other], everyone[0])]
    if not different:
        return
    tables: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(tables, dict(table))
    other = different[0]
    lines = _differences(tables[0], tables[other], other)
    raise ValueError(
        f"{what} differ between ranks (rank 0 and {ranks_named(different)}):\n  "
        + listed(lines, between="\n  ")
        + "\nEvery rank must build the same model: same configuration, same code, same versions"
    )


def _differences(zero: Mapping[str, str], one: Mapping[str, str], rank: int) -> list[str]:
    names = list(dict.fromkeys([*zero, *one]))
    lines = [
        f"{name}: {zero.get(name, 'absent')} on rank 0, {one.get(name, 'absent')} on rank {rank}"
        for name in names
        if zero.get(name) != one.get(name)
    ]
    if not lines:
        first = next(i for i, (a, b) in enumerate(zip(zero, one, strict=True)) if a != b)
        lines = [
            f"entry {first} is {list(zero)[first]} on rank 0, {list(one)[first]} on rank {rank}: the order differs"
        ]
    return lines


def at_rank_zero(tensor: Tensor, owner: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Yield (0, the complete tensor), or the rows of a stack from each rank of the first expert-parallel group.

    Rank 0 gets all experts, in pieces with the first global id of each; other ranks get at most their own. Every rank
    must exhaust this.
    """
    rank, _ = rank_and_world()
    whole = tensor.detach()
    if not isinstance(owner, GroupedExperts):
        yield 0, whole
        return
    rows = len(owner.local_experts)
    for source in range(owner.num_experts // rows):
        if source == rank == 0:
            yield 0, whole
        elif rank == source:
            dist.send(whole.contiguous(), dst=0)
        elif rank == 0:
            arrived = torch.empty_like(whole)
            dist.recv(arrived, src=source)
            yield source * rows, arrived


def raise_together(what: str, error: Exception | None) -> None:
    """Raise on every rank if rank 0 has an error, so that no rank waits forever; every rank must call this."""
    rank, world = rank_and_world()
    message = [f"{type(error).__name__}: {error}" if error is not None else ""]
    if world > 1:
        dist.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    if message[0]:
        raise RuntimeError(f"rank {rank} stops because {what} failed on rank 0: {message[0]}")

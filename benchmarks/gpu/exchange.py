"""Check and time the uneven all-to-all of rows over all GPUs: values, gradients, rate."""

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from benchmarks.gpu.device import synchronise
from benchmarks.gpu.parts import Skipped
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure
from benchmarks.harness.measure import OutputsDiffer
from benchmarks.harness.spawned import on_ranks
from finetune.ranks.engine import engine_device
from moe.dispatch import exchange


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield the bytes per second that a rank sends to others, after comparing the received rows with the sent ones."""
    if sizes.world < 2:
        raise Skipped("one GPU: this part needs at least two")
    ranks = on_ranks(sizes.world, _one, sizes, accelerator=sizes.device)
    sent, seconds = min(rank["sent"] for rank in ranks), max(rank["seconds"] for rank in ranks)
    yield Figure(
        f"all-to-all, {sizes.exchange_rows} rows a rank over {sizes.world} ranks",
        sent / seconds / 1e9,
        "GB/s",
        config={"rows": sizes.exchange_rows, "hidden": sizes.model.hidden, "ranks": sizes.world, "dtype": "bfloat16"},
        n=2 * sizes.rounds,
        better="higher",
    )


def _one(sizes: Sizes) -> dict[str, float]:
    """Run one rank: it sends rank r a share that grows with r, each row marked with its sender and receiver."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = engine_device()
    group = dist.group.WORLD
    shares = [sizes.exchange_rows * (to + 1) // (world * (world + 1) // 2) for to in range(world)]
    receive = [shares[rank]] * world
    marks = torch.cat([torch.full((n,), rank * world + to) for to, n in enumerate(shares)])
    x = marks[:, None].expand(-1, sizes.model.hidden).to(device, torch.bfloat16).contiguous().requires_grad_()
    came = exchange(x, receive, shares, group)
    torch.autograd.backward(came, came.detach())
    expected = torch.cat([torch.full((n,), sender * world + rank) for sender, n in enumerate(receive)])
    assert x.grad is not None
    if not torch.equal(came[:, 0].cpu().long(), expected) or not torch.equal(x.grad, x.detach()):
        raise OutputsDiffer(f"rank {rank}: the received rows or the returned gradients differ from those sent")
    seconds = []
    with torch.no_grad():
        for _ in range(2 * sizes.rounds):
            dist.barrier()
            start = time.perf_counter()
            exchange(x, receive, shares, group)
            synchronise()
            seconds.append(time.perf_counter() - start)
    away = sum(shares) - shares[rank]
    return {"sent": away * sizes.model.hidden * 2, "seconds": min(seconds)}

"""Every node together, before a run: do all ranks hear each other, how fast, and on which wires?

`torchrun ... -m finetune.planner.cluster_check` on the very nodes of the run. Every rank must take part; rank 0 prints.
"""

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from finetune.planner.doctor import Finding
from finetune.ranks.collectives import gather_lists

MEGABYTES = 64
ROUNDS = 5
SLOW = 0.7
"""A node below this share of the median is named."""
CLOCK_S = 5.0
NETWORK = ("NCCL_", "GLOO_", "FI_", "UCX_", "TORCH_NCCL_")
SETTINGS_THAT_MUST_AGREE = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_PROTO", "NCCL_ALGO",
                            "NCCL_P2P_DISABLE", "GLOO_SOCKET_IFNAME", "FI_PROVIDER")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank says of itself and of the wires."""

    rank: int
    host: str
    address: str
    device: str
    versions: str
    network: Mapping[str, str]
    clock_offset: float
    """Seconds that its clock is ahead of rank 0's."""
    matmul: float
    """Floating-point operations a second."""
    all_reduce: float
    """Bytes a second, as a ring would move them."""
    all_to_all: float
    beside: float
    """The same all-reduce among the ranks of its node alone."""


def findings(ranks: Sequence[RankFacts]) -> list[Finding]:
    """What is wrong among the ranks, by what they said."""
    found = []
    for what, values in (
        ("versions", {r.host: r.versions for r in ranks}),
        ("device", {r.host: r.device for r in ranks}),
    ):
        if len(set(values.values())) > 1:
            listed = "; ".join(f"{host}: {value}" for host, value in values.items())
            found.append(Finding(check=what, text=f"nodes differ ({listed})", remedy="Use one image on all nodes"))
    for name in SETTINGS_THAT_MUST_AGREE:
        said = {r.host: r.network.get(name, "(not set)") for r in ranks}
        if len(set(said.values())) > 1:
            listed = "; ".join(f"{host}: {value}" for host, value in said.items())
            remedy = "Set it for all ranks (the profile's env), not in one node's shell"
            found.append(Finding(check="network", text=f"{name} differs between nodes ({listed})", remedy=remedy))
    if len({r.host for r in ranks}) > 1:
        for host in {r.host for r in ranks if r.address.startswith(("127.", "172.17."))}:
            text = f"{host} would speak through an address that others cannot reach (loopback or a container's bridge)"
            remedy = "Set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that joins the nodes"
            found.append(Finding(check="network", text=text, remedy=remedy))
    for host, offset in {r.host: r.clock_offset for r in ranks}.items():
        if abs(offset) > CLOCK_S:
            text = f"the clock of {host} is {offset:+.1f} s from rank 0's"
            found.append(
                Finding(check="clock", text=text, remedy="Start its time service (chrony): logs and tokens rely on it")
            )
    for what, unit in (("matmul", 1e12), ("beside", 1e9), ("all_to_all", 1e9)):
        by_host: dict[str, float] = {}
        for rank in ranks:
            by_host[rank.host] = min(by_host.get(rank.host, float("inf")), getattr(rank, what))
        usual = sorted(by_host.values())[len(by_host) // 2]
        found += [
            Finding(
                check="slow node",
                text=f"{host} reaches {value / unit:.2f} of {what} where nodes usually reach {usual / unit:.2f}",
                remedy="Leave it out, or look at its clocks, links and temperature (nvidia-smi -q)",
            )
            for host, value in by_host.items()
            if value < SLOW * usual
        ]
    return found


def measure(device: torch.device, *, megabytes: int = MEGABYTES) -> RankFacts:
    """Measure this rank; every rank must call this."""
    rank, world = dist.get_rank(), dist.get_world_size()
    host = os.environ.get("MOETUNE_HOST") or socket.gethostname()
    hosts = gather_lists([host])
    size = megabytes * 2**20 // 4 // world * world
    payload = torch.ones(size, device=device)
    everyone = dist.group.WORLD
    groups = {name: dist.new_group([r for r in range(world) if hosts[r] == name]) for name in sorted(set(hosts))}
    dist.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    leader = now.clone()
    dist.broadcast(leader, src=0)
    arrived = torch.empty_like(payload)
    return RankFacts(
        rank=rank,
        host=host,
        address=_address(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        versions=f"torch {torch.__version__}",
        network={key: value for key, value in sorted(os.environ.items()) if key.startswith(NETWORK)},
        clock_offset=float(now - leader),
        matmul=_matmul(device),
        all_reduce=_rate(lambda: dist.all_reduce(payload, group=everyone), payload, device),
        all_to_all=_rate(lambda: dist.all_to_all_single(arrived, payload, group=everyone), payload, device),
        beside=_rate(lambda: dist.all_reduce(payload, group=groups[host]), payload, device),
    )


def _rate(call: Any, payload: torch.Tensor, device: torch.device) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
        payload.fill_(1.0)
    return payload.numel() * payload.element_size() / min(times)


def _matmul(device: torch.device) -> float:
    n = 4096 if device.type == "cuda" else 512
    square = torch.ones(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    times = []
    for _ in range(ROUNDS):
        _wait(device)
        began = time.perf_counter()
        square @ square
        _wait(device)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _address() -> str:
    """The address from which this rank reaches the leader."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return str(probe.getsockname()[0])


def main() -> int:
    """Run one rank; 3 when something was found."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=datetime.timedelta(seconds=120))
    facts = gather_lists([measure(device)])
    found = findings(facts)
    if dist.get_rank() == 0:
        _print(facts, found)
    dist.barrier()
    dist.destroy_process_group()
    return 3 if found else 0


def _print(facts: Sequence[RankFacts], found: Sequence[Finding]) -> None:
    if os.environ.get("MOETUNE_JSON"):
        answer = {"ranks": [asdict(one) for one in facts], "findings": [asdict(one) for one in found]}
        sys.stdout.write(json.dumps(answer) + "\n")
        return
    lines = ["rank  host             address          all-reduce  all-to-all  in the node  GB/s"]
    lines += [
        f"{r.rank:>4}  {r.host:<15}  {r.address:<15}  {r.all_reduce / 1e9:>10.2f}  {r.all_to_all / 1e9:>10.2f}  "
        f"{r.beside / 1e9:>11.2f}  {r.device}; {' '.join(f'{k}={v}' for k, v in r.network.items()) or 'no settings'}"
        for r in facts
    ]
    lines += [str(one) for one in found] or ["nothing found"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())

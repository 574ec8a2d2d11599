"""Checks all nodes together before a run: whether all ranks reach each other, how fast, and over which links.

`torchrun ... -m finetune.preflight.cluster_check` on the nodes of the run. Every rank must take part; rank 0 prints.
"""

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from finetune.preflight.doctor import Finding
from finetune.ranks.collectives import gather_lists

MEGABYTES = 64
ROUNDS = 5
SLOW = 0.7
"""A node below this share of the median is named."""
CLOCK_S = 5.0
"""Seconds that a clock may be off."""
NETWORK = ("NCCL_", "GLOO_", "FI_", "UCX_", "TORCH_NCCL_")
SETTINGS_THAT_MUST_AGREE = (
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_IB_DISABLE",
    "NCCL_PROTO",
    "NCCL_ALGO",
    "NCCL_P2P_DISABLE",
    "GLOO_SOCKET_IFNAME",
    "FI_PROVIDER",
)
UNITS = {"matmul": 1e12, "beside": 1e9, "all_to_all": 1e9}
"""The figures compared between nodes, and the units in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """The report of one rank on itself and its links."""

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
    """Return what is wrong among the ranks, by what they report."""
    return [*_differences(ranks), *_addresses(ranks), *_clocks(ranks), *_slow_nodes(ranks)]


def _differences(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Yield versions, devices and settings that differ between nodes."""
    for check in ("versions", "device"):
        listed = _listed_if_different({rank.host: getattr(rank, check) for rank in ranks})
        if listed:
            yield Finding(check=check, text=f"nodes differ ({listed})", remedy="Use one image on all nodes")
    for name in SETTINGS_THAT_MUST_AGREE:
        listed = _listed_if_different({rank.host: rank.network.get(name, "(not set)") for rank in ranks})
        if listed:
            remedy = "Set it for all ranks (the profile's env), not in one node's shell"
            yield Finding(check="network", text=f"{name} differs between nodes ({listed})", remedy=remedy)


def _listed_if_different(values: Mapping[str, str]) -> str:
    if len(set(values.values())) == 1:
        return ""
    return "; ".join(f"{host}: {value}" for host, value in values.items())


def _addresses(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Yield nodes that would use an address that the others cannot reach."""
    if len({rank.host for rank in ranks}) == 1:
        return
    for host in {rank.host for rank in ranks if rank.address.startswith(("127.", "172.17."))}:
        text = f"{host} would speak through an address that others cannot reach (loopback or a container's bridge)"
        remedy = "Set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that joins the nodes"
        yield Finding(check="network", text=text, remedy=remedy)


def _clocks(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Yield nodes whose clock is off."""
    for host, offset in {rank.host: rank.clock_offset for rank in ranks}.items():
        if abs(offset) > CLOCK_S:
            text = f"the clock of {host} is {offset:+.1f} s from rank 0's"
            remedy = "Start its time service (chrony): logs and tokens rely on it"
            yield Finding(check="clock", text=text, remedy=remedy)


def _slow_nodes(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Yield nodes that are slower than the usual one."""
    for name, unit in UNITS.items():
        by_host: dict[str, float] = {}
        for rank in ranks:
            by_host[rank.host] = min(by_host.get(rank.host, float("inf")), getattr(rank, name))
        usual = sorted(by_host.values())[len(by_host) // 2]
        for host, rate in by_host.items():
            if rate < SLOW * usual:
                text = f"{host} reaches {rate / unit:.2f} of {name} where nodes usually reach {usual / unit:.2f}"
                remedy = "Leave it out, or look at its clocks, links and temperature (nvidia-smi -q)"
                yield Finding(check="slow node", text=text, remedy=remedy)


def measure(device: torch.device, *, megabytes: int = MEGABYTES) -> RankFacts:
    """Measure this rank; every rank must call this."""
    rank, world = dist.get_rank(), dist.get_world_size()
    host = os.environ.get("MOETUNE_HOST") or socket.gethostname()
    hosts = gather_lists([host])
    size = megabytes * 2**20 // 4 // world * world
    payload = torch.ones(size, device=device)
    everyone = dist.group.WORLD
    groups = {
        name: dist.new_group([rank for rank, at in enumerate(hosts) if at == name]) for name in sorted(set(hosts))
    }
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


def _rate(call: Callable[[], object], payload: torch.Tensor, device: torch.device) -> float:
    """Return the bytes of the payload a second that a collective moves; every rank must call this."""

    def together() -> None:
        dist.barrier()
        payload.fill_(1.0)

    call()
    return payload.numel() * payload.element_size() / _fastest(call, device, before=together)


def _matmul(device: torch.device) -> float:
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    square = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: square @ square, device)


def _fastest(call: Callable[[], object], device: torch.device, before: Callable[[], object] = lambda: None) -> float:
    """Return the seconds of the fastest of several rounds, with `before` in front of each."""
    times = []
    for _ in range(ROUNDS):
        before()
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _address() -> str:
    """Return the address from which this rank reaches the leader."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return str(probe.getsockname()[0])


def main() -> int:
    """Run one rank; 3 when anything is wrong."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=datetime.timedelta(seconds=120))
    facts = gather_lists([measure(device)])
    problems = findings(facts)
    if dist.get_rank() == 0:
        _print(facts, problems)
    dist.barrier()
    dist.destroy_process_group()
    return 3 if problems else 0


def _print(ranks: Sequence[RankFacts], problems: Sequence[Finding]) -> None:
    if os.environ.get("MOETUNE_JSON"):
        answer = {"ranks": [asdict(rank) for rank in ranks], "findings": [asdict(finding) for finding in problems]}
        sys.stdout.write(json.dumps(answer) + "\n")
        return
    lines = ["rank  host             address          all-reduce  all-to-all  in the node  GB/s"]
    lines += map(_row, ranks)
    lines += [str(finding) for finding in problems] or ["nothing found"]
    sys.stdout.write("\n".join(lines) + "\n")


def _row(rank: RankFacts) -> str:
    settings = " ".join(f"{name}={value}" for name, value in rank.network.items()) or "no settings"
    rates = f"{rank.all_reduce / 1e9:>10.2f}  {rank.all_to_all / 1e9:>10.2f}  {rank.beside / 1e9:>11.2f}"
    return f"{rank.rank:>4}  {rank.host:<15}  {rank.address:<15}  {rates}  {rank.device}; {settings}"


if __name__ == "__main__":
    sys.exit(main())

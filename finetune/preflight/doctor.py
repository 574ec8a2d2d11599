"""Looks for known traps before GPUs are taken. Each finding says what is wrong and what to do. Loads no torch.

A check takes what it looks at as an argument, so that a test can provoke it; `machine_findings` and `run_findings` pass
what this machine has.
"""

import os
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from data.format.printable import count_of
from data.rows.files import is_rows
from data.shards.find import find_shards
from data.stores.remote import is_remote
from finetune.config import RunConfig
from finetune.preflight.start import place_problems
from finetune.ranks.versions import TESTED, command, demand, installed_versions, numbers, untested

LEAST = {
    "flash-attn": ((2, 8), "pip install 'flash-attn>=2.8', or remove it: torch's own kernel is used then"),
    "nvidia-nccl-cu12": ((2, 27), f"{command('torch')}, which brings its own"),
    "nvidia-nccl-cu13": ((2, 27), f"{command('torch')}, which brings its own"),
}
"""The oldest versions of packages that need not be there."""
SHM_BYTES_PER_RANK = 1 << 30
"""Free shared memory that a rank needs."""
FILES = 4096
"""Files that a process must be allowed to open."""
DRIVER = (550, 54)
"""The oldest driver."""
DRIVER_OF = {"nvidia-nccl-cu13": ("CUDA 13", (580, 65))}
"""The oldest driver for a build of torch that brings this package."""
GROUPED = (9, 10)
"""Major compute capabilities for which torch has a grouped GEMM."""
QUERY = "name,driver_version,compute_cap,memory.used,memory.total"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem, and what to do about it."""

    check: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}: {self.text}. {self.remedy}"


def version_findings(installed: Mapping[str, str]) -> Iterator[Finding]:
    """Yield packages that are missing, too old, or newer than what is tested."""
    for name in TESTED:
        if name not in installed:
            yield Finding(check="versions", text=f"{name} is not installed", remedy=command(name))
    for name, version in untested(installed):
        text = f"{name} {version} is installed, and {demand(name)}"
        yield Finding(check="versions", text=text, remedy=command(name))
    for name, (least, remedy) in LEAST.items():
        if name in installed and numbers(installed[name]) < least:
            text = f"{name} {installed[name]} is older than {'.'.join(map(str, least))}"
            yield Finding(check="versions", text=text, remedy=remedy)


def kernel_findings(config: RunConfig | None, *, present: Mapping[str, bool]) -> Iterator[Finding]:
    """Yield kernels that the configuration names and that cannot be imported."""
    if config is not None and config.moe.dispatch == "deepep" and not present["deep_ep"]:
        text = "moe.dispatch is deepep, and the package deep_ep cannot be imported"
        yield Finding(check="kernels", text=text, remedy="Build DeepEP, or set moe.dispatch=all_to_all")
    if config is not None and config.model.attention == "flash_attention_2" and not present["flash_attn"]:
        text = "model.attention is flash_attention_2, and the package flash_attn cannot be imported"
        yield Finding(check="kernels", text=text, remedy="pip install flash-attn, or set model.attention=auto")


def driver_findings(smi: str | None, installed: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is wrong by nvidia-smi's answer to QUERY, if there is one, with what torch was built for."""
    if smi is None:
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in smi.splitlines() if line.count(",") == 4]
    if not rows:
        remedy = "Load the driver, or start the container with --gpus all"
        yield Finding(check="driver", text=f"nvidia-smi says {smi.strip()[:120]!r}", remedy=remedy)
        return
    names = {row[0] for row in rows}
    if len(names) > 1:
        remedy = "Take nodes of one kind: the slowest sets every step"
        yield Finding(check="driver", text=f"GPUs of different kinds: {', '.join(sorted(names))}", remedy=remedy)
    build, least = next((DRIVER_OF[name] for name in installed if name in DRIVER_OF), ("torch", DRIVER))
    if numbers(rows[0][1]) < least:
        remedy = "Update the driver, or install the compatibility package of your CUDA version"
        text = f"driver {rows[0][1]} is older than {'.'.join(map(str, least))}, which {build} wants"
        yield Finding(check="driver", text=text, remedy=remedy)
    slow = [row[2] for row in rows if numbers(row[2]) and numbers(row[2])[0] not in GROUPED]
    if slow:
        text = (
            f"compute capability {slow[0]}: experts run one by one there, after a wait for the device; torch has a "
            f"kernel for all at once on {' and '.join(f'{major}.x' for major in GROUPED)}, in bfloat16"
        )
        yield Finding(check="grouped_mm", text=text, remedy="It works, slowly; `moetune plan` counts with it")
    for number, row in enumerate(rows):
        used = numbers(row[3])  # a slice of a GPU says [N/A]
        if used > (1024,):
            remedy = "End whatever holds it (nvidia-smi names the processes), or take another node"
            yield Finding(check="driver", text=f"GPU {number} has {used[0]:,} MiB in use already", remedy=remedy)


def visible_findings(smi: str | None, *, ranks: int, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a finding where a rank does not see its GPU: rank n of a node takes the n-th that is visible to it."""
    gpus = sum(line.count(",") == 4 for line in (smi or "").splitlines())
    if not gpus:
        return
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    visible = gpus if setting is None else sum(bool(word.strip()) for word in setting.split(","))
    local_rank = max(int(environment.get(name, "0")) for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    needed = max(ranks, local_rank + 1)
    if visible < needed:
        cause = "" if setting is None else f" (CUDA_VISIBLE_DEVICES={setting})"
        seen = f"{count_of(visible, 'GPU')} can be seen{cause}"
        text = f"{count_of(needed, 'rank')} of this node need a GPU each, but {seen}"
        remedy = (
            "Let every rank see all GPUs of its node: Slurm's --gpus-per-node with one task per node, not "
            "--gpus-per-task or --gpu-bind; or start as many ranks as there are GPUs"
        )
        yield Finding(check="visible GPUs", text=text, remedy=remedy)


def memory_findings(shm: Path, *, ranks: int) -> Iterator[Finding]:
    """Yield a finding where shared memory is short, through which readers hand samples over."""
    room, needed = shutil.disk_usage(shm).free, ranks * SHM_BYTES_PER_RANK
    if room < needed:
        text = f"{shm} has {room / 1e9:.2f} GB free; {count_of(ranks, 'rank')} need {needed / 1e9:.1f} GB"
        remedy = "Start the container with --ipc=host or --shm-size (Kubernetes: an emptyDir with medium Memory)"
        yield Finding(check="shared memory", text=text, remedy=remedy)


def descriptor_findings(limit: int) -> Iterator[Finding]:
    """Yield a finding where too few files may be open for the sockets of every rank, and shards."""
    if 0 <= limit < FILES:
        text = f"at most {limit:,} files may be open, {FILES:,} are needed"
        yield Finding(check="descriptors", text=text, remedy=f"ulimit -n {FILES} (or LimitNOFILE of the service)")


def reader_findings(config: RunConfig, *, ranks: int) -> Iterator[Finding]:
    """Yield sources of too few shards to be read side by side."""
    readers = ranks * max(1, config.data.workers)
    cache = Path(config.data.cache_dir) if config.data.cache_dir else None
    for name, source in config.data.sources.items():
        if is_rows(source.path) or is_remote(source.path):
            continue
        try:
            shards = find_shards(source.path, f"data.sources.{name}.path", split=source.split, cache_dir=cache)
        except ValueError:  # place_problems says it
            continue
        if len(shards) < min(readers, 8) and sum(shard.stat().st_size for shard in shards) > 10**9:
            text = f"source {name} has {count_of(len(shards), 'shard')} for {count_of(readers, 'reader')}"
            yield Finding(check="shards", text=text, remedy="`moetune shards split` cuts them smaller")


def wandb_findings(config: RunConfig, *, url: str, timeout: float = 5.0) -> Iterator[Finding]:
    """Yield findings where metrics are to go to Weights & Biases and it does not answer, or nobody is logged in."""
    if config.track.wandb != "online":
        return
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=timeout).close()
    except OSError as error:
        text = f"{url} cannot be reached ({error})"
        remedy = "Set track.wandb=offline and sync later, or open the way; training would go on without it"
        yield Finding(check="W&B", text=text, remedy=remedy)
    if not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists()):
        remedy = "Run `wandb login` once, or export WANDB_API_KEY"
        yield Finding(check="W&B", text="nobody is logged in", remedy=remedy)


def machine_findings(config: RunConfig | None, *, ranks: int, smi: str | None) -> Iterator[Finding]:
    """Yield everything about this machine."""
    installed = installed_versions([*TESTED, *LEAST])
    yield from version_findings(installed)
    present = {name: find_spec(name) is not None for name in ("deep_ep", "flash_attn")}
    yield from kernel_findings(config, present=present)
    yield from driver_findings(smi, installed)
    yield from visible_findings(smi, ranks=ranks, environment=os.environ)
    yield from memory_findings(Path("/dev/shm"), ranks=ranks)
    yield from descriptor_findings(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def run_findings(config: RunConfig, *, ranks: int) -> Iterator[Finding]:
    """Yield everything about one run."""
    for wrong in place_problems(config)[0]:
        yield Finding(check=wrong.key, text=f"{wrong.found!r}: {wrong.allowed}", remedy=wrong.remedy)
    yield from reader_findings(config, ranks=ranks)
    yield from wandb_findings(config, url=os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))

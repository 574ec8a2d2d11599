"""What the planner knows of GPUs and how they are joined: vendors' data sheets, dense bfloat16. Loads no torch."""

from dataclasses import dataclass

from finetune.architecture.flops import peak_flops
from finetune.settings.problems import did_you_mean

GB = 10**9
GIB = 2**30
MEMORY_SHARE = 0.8
"""Of the memory's data-sheet rate, what kernels reach: 2.7 of 3.35 TB/s on an H100."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Shares of the peak that kernels in bfloat16 reach at the sizes of a layer."""

    dense: float
    grouped: float
    attention: float
    """FlashAttention 2, which is what `varlen` runs, forward and backward together."""
    has_grouped_mm: bool = True
    """Whether torch has a grouped kernel for bfloat16 there (compute capability 9.0, 10.0); else it calls one product
    an expert, at the share of `grouped`."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device. Bytes a second are per direction, of one device; `link` joins those of one node."""

    name: str
    memory_bytes: int
    flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    """Of the network card that a device usually has for itself; a node's figure divided by its devices."""
    kernels: Kernels

    @property
    def reached_memory_rate(self) -> float:
        """Bytes a second that kernels read and write."""
        return MEMORY_SHARE * self.memory_rate


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many devices, so many of them in a node."""

    gpu: Gpu
    gpus: int
    per_node: int
    price: float | None = None
    """Of one device for one hour."""

    @property
    def nodes(self) -> int:
        """Nodes, the last perhaps not full."""
        return -(-self.gpus // self.per_node)


def gpu_names() -> tuple[str, ...]:
    """Every name that `--gpu` takes."""
    return tuple(_TABLE)


def gpu(name: str) -> Gpu:
    """The table's entry."""
    found = _TABLE.get(name.lower())
    if found is None:
        advice = did_you_mean(name.lower(), gpu_names())
        raise ValueError(f"--gpu: {name!r} is not in the table ({', '.join(gpu_names())}). {advice}")
    return found


def gpu_like(device: str) -> Gpu | None:
    """The table's entry for a device's own name, such as NVIDIA H100 80GB HBM3; of one kind the smaller."""
    words = device.lower().replace("-", " ").split()
    return next((entry for entry in _TABLE.values() if entry.name.partition("-")[0] in words), None)


def cluster(name: str, *, gpus: int, per_node: int | None, price: float | None) -> Cluster:
    """What is planned for; nodes of eight unless told otherwise, or one smaller node."""
    size = min(8, gpus) if per_node is None else per_node
    if gpus > size and gpus % size:
        below, above = gpus // size * size, -(-gpus // size) * size
        raise ValueError(f"--gpus: {gpus} do not fill nodes of {size}; take {below} or {above}, or set --per-node")
    if price is not None and price < 0:
        raise ValueError(f"--price: {price} for a GPU hour is below 0; give what one GPU costs for an hour")
    return Cluster(gpu=gpu(name), gpus=gpus, per_node=size, price=price)


HOPPER = Kernels(dense=0.63, grouped=0.42, attention=0.35)
"""620, 420 and 350 of 989 TFLOP/s. Dense: 788 was measured for a large product on an H200, less is taken at a layer's
sizes. Grouped: Liger's kernel reached 413, forward and backward (its benchmark's file). Attention: the authors of
FlashAttention 2 say 370 for forward."""
AMPERE = Kernels(dense=0.7, grouped=0.6, attention=0.55, has_grouped_mm=False)
"""Its authors say that FlashAttention 2 lets a whole training reach 0.72; the rest is assumed, and so are Ada's."""
BLACKWELL = Kernels(dense=0.6, grouped=0.4, attention=0.17)
"""Assumed; the kernel of attention was made for older devices, and is taken to be as fast as on an H100."""
LITTLE_HOPPER = Kernels(dense=0.85, grouped=0.75, attention=0.75)
"""Assumed: the H20 has an H200's memory and a seventh of its peak, so kernels come closer to it."""


def _row(name: str, kernels: Kernels, gib: float, memory_rate: float, link_rate: float, network_rate: float) -> Gpu:
    flops = 148e12 if name.startswith("h20-") else peak_flops(name.partition("-")[0])
    assert flops is not None
    return Gpu(
        name=name, memory_bytes=int(gib * GIB), flops=flops, memory_rate=memory_rate * GB, link_rate=link_rate * GB,
        network_rate=network_rate * GB, kernels=kernels,
    )  # fmt: skip


# Memory is what the driver shows, a little below the name. Link: NVLink one way; of L40S, PCIe 4.
_TABLE = {
    entry.name: entry
    for entry in (
        _row("a100-40gb", AMPERE, 39.4, 1555, 300, 25),
        _row("a100-80gb", AMPERE, 79.1, 2039, 300, 25),
        _row("h100-80gb", HOPPER, 79.1, 3350, 450, 50),
        _row("h200-141gb", HOPPER, 139.7, 4800, 450, 50),
        _row("h20-96gb", LITTLE_HOPPER, 95.0, 4000, 450, 50),
        _row("b200-180gb", BLACKWELL, 178.0, 8000, 900, 50),
        _row("l40s-48gb", AMPERE, 44.5, 864, 25, 12.5),
    )
}

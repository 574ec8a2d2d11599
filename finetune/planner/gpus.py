"""Table of GPUs and their links, from vendors' data sheets, with rates in dense bfloat16. Loads no torch."""

from dataclasses import dataclass

from finetune.settings.problems import did_you_mean

GB = 10**9
GIB = 2**30
MEMORY_SHARE = 0.8
"""Share of the memory's data-sheet rate that kernels reach: 2.7 of 3.35 TB/s on an H100."""

GROUPED_FROM = 9.0
"""The compute capability from which torch has a grouped kernel: Hopper and data-centre Blackwell."""

_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX4090": 165e12,
    "A6000": 155e12,
}
"""Dense bfloat16 operations per second, under the first name that the device's own name contains."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Shares of the peak that kernels in bfloat16 reach at the sizes of a layer."""

    dense: float
    grouped: float
    attention: float
    """FlashAttention 2, which `varlen` runs; forward and backward together."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device. Rates are bytes per second of one device in one direction; `link` joins the devices of a node."""

    name: str
    memory_bytes: int
    flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    """Rate of a device's own network card; a node's figure divided by its devices."""
    kernels: Kernels
    capability: float = 9.0
    """CUDA's compute capability."""

    @property
    def has_grouped_mm(self) -> bool:
        """Return whether torch has a grouped bfloat16 kernel for the device. If not, it calls a product per expert."""
        return self.capability >= GROUPED_FROM

    @property
    def reached_memory_rate(self) -> float:
        """Return the bytes per second that kernels read and write."""
        return MEMORY_SHARE * self.memory_rate


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A number of GPUs, and how many of them are in each node."""

    gpu: Gpu
    gpus: int
    per_node: int
    price: float | None = None
    """Price of one device for one hour."""

    @property
    def nodes(self) -> int:
        """Return the number of nodes; the last may not be full."""
        return -(-self.gpus // self.per_node)


def peak_flops(device: str) -> float | None:
    """Return the dense bfloat16 operations per second of a device by its name; None for an unknown one."""
    return next((peak for name, peak in _PEAKS.items() if name.lower() in device.lower()), None)


def gpu_names() -> tuple[str, ...]:
    """Return every name that `--gpu` accepts."""
    return tuple(_TABLE)


def gpu(name: str) -> Gpu:
    """Return the table's entry for a name given with `--gpu`."""
    entry = _TABLE.get(name.lower())
    if entry is None:
        advice = did_you_mean(name.lower(), gpu_names())
        raise ValueError(f"--gpu: {name!r} is not in the table ({', '.join(gpu_names())}). {advice}")
    return entry


def gpu_like(device: str) -> Gpu | None:
    """Return the table's entry for a device's own name, such as NVIDIA H100 80GB HBM3; of several the smallest."""
    words = device.lower().replace("-", " ").split()
    return next((entry for entry in _TABLE.values() if entry.name.partition("-")[0] in words), None)


def cluster(name: str, *, gpus: int, per_node: int | None, price: float | None) -> Cluster:
    """Return the cluster to plan for: nodes of `per_node` GPUs, by default eight, or one smaller node."""
    size = min(8, gpus) if per_node is None else per_node
    if gpus > size and gpus % size:
        below, above = gpus // size * size, -(-gpus // size) * size
        raise ValueError(f"--gpus: {gpus} do not fill nodes of {size}; take {below} or {above}, or set --per-node")
    if price is not None and price < 0:
        raise ValueError(f"--price: {price} for a GPU hour is below 0; give what one GPU costs for an hour")
    return Cluster(gpu=gpu(name), gpus=gpus, per_node=size, price=price)


HOPPER = Kernels(dense=0.63, grouped=0.42, attention=0.35)
"""620, 420 and 350 of 989 TFLOP/s. Dense: 788 was measured for a large product on an H200; less is assumed at a layer's
sizes. Grouped: Liger's kernel reached 413, forward and backward (its benchmark's file). Attention: the authors
of FlashAttention 2 report 370 for forward."""
AMPERE = Kernels(dense=0.7, grouped=0.6, attention=0.55)
"""The authors of FlashAttention 2 report 0.72 for a complete training; the rest is assumed, also for Ada."""
BLACKWELL = Kernels(dense=0.6, grouped=0.4, attention=0.17)
"""Assumed; the attention kernel was written for older devices, and is assumed to be as fast as on an H100."""
LITTLE_HOPPER = Kernels(dense=0.85, grouped=0.75, attention=0.75)
"""Assumed: the H20 has an H200's memory and a seventh of its peak, so kernels come closer to that peak."""


def _row(
    name: str,
    kernels: Kernels,
    gib: float,
    memory_rate: float,
    link_rate: float,
    network_rate: float,
    capability: float,
) -> Gpu:
    flops = peak_flops(name.partition("-")[0])
    assert flops is not None
    return Gpu(
        name=name,
        memory_bytes=int(gib * GIB),
        flops=flops,
        memory_rate=memory_rate * GB,
        link_rate=link_rate * GB,
        network_rate=network_rate * GB,
        kernels=kernels,
        capability=capability,
    )


# Memory as the driver shows it, a little below the advertised size. Link: NVLink, one way; PCIe 4 for L4, 4090, A6000
# and L40S, of which those with 24 GB share one network card of 100 Gbit/s among eight.
_TABLE = {
    entry.name: entry
    for entry in (
        _row("a100-40gb", AMPERE, 39.4, 1555, 300, 25, 8.0),
        _row("a100-80gb", AMPERE, 79.1, 2039, 300, 25, 8.0),
        _row("h100-80gb", HOPPER, 79.1, 3350, 450, 50, 9.0),
        _row("h200-141gb", HOPPER, 139.7, 4800, 450, 50, 9.0),
        _row("h20-96gb", LITTLE_HOPPER, 95.0, 4000, 450, 50, 9.0),
        _row("b200-180gb", BLACKWELL, 178.0, 8000, 900, 50, 10.0),
        _row("b300-288gb", BLACKWELL, 267.0, 8000, 900, 100, 10.3),
        _row("l40s-48gb", AMPERE, 44.5, 864, 25, 12.5, 8.9),
        _row("a6000-48gb", AMPERE, 47.5, 768, 25, 12.5, 8.6),
        _row("rtx4090-24gb", AMPERE, 23.6, 1008, 25, 1.5, 8.9),
        _row("l4-24gb", AMPERE, 22.0, 300, 25, 1.5, 8.9),
    )
}


def this_machine(memory_bytes: int, *, device: bool) -> Gpu:
    """Return a GPU that is not in the table, as an H100 with other memory, or a CPU with round numbers."""
    return Gpu(
        name="this machine" if device else "CPU",
        memory_bytes=memory_bytes,
        flops=989e12 if device else 1e11,
        memory_rate=3e12 if device else 1e10,
        link_rate=450e9 if device else 1e9,
        network_rate=50e9 if device else 1e9,
        kernels=HOPPER,
    )

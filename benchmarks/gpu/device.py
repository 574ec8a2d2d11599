"""Access the accelerator of this process, its counters and the profiler."""

import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.measure import Side

WAITS = ("Synchronize", "cudaMemcpy")
"""Words in the names of calls that block the host until the device is done; asynchronous copies do not."""


def synchronise() -> None:
    """Wait for the GPU; do nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cudnn_version() -> int | None:
    """Return the version as a number: 92000 is 9.20.0."""
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return version


def nccl_version() -> str:
    """Return the version with dots."""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def allocated() -> int:
    """Return the bytes of tensors on the GPU; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_of(side: Side) -> int:
    """Return the peak bytes of tensors on the GPU while a side runs once; 0 on a CPU."""
    if not torch.cuda.is_available():
        side.run()
        return 0
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    side.run()
    synchronise()
    return torch.cuda.max_memory_allocated()


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """One run under torch's profiler, in seconds. On a CPU, operations count as kernels."""

    operations: dict[str, float]
    """Device time by the operation that launched it."""
    kernels: dict[str, float]
    """Device time by kernel, longest first."""
    device: float
    """Sum over kernels."""
    host: float
    """Host time, including the profiler's own work but not the calls that wait for the device."""


def profiled(side: Side) -> Profiled:
    """Run a side once under the profiler, which slows down the host but not the kernels."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronise()
    with profile(activities=activities, acc_events=True) as seen:
        start = time.perf_counter()
        side.run()
        synchronise()
        host = time.perf_counter() - start
    operations: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in seen.key_averages():
        if event.is_user_annotation:  # a range around kernels, which are counted on their own
            continue
        on_device = event.self_device_time_total if cuda else event.self_cpu_time_total
        is_kernel = str(event.device_type).endswith("CUDA")
        if is_kernel:
            kernels[event.key] = on_device / 1e6
        elif on_device:
            operations[event.key] = on_device / 1e6
        if event.key.startswith("cuda") and _waits(event.key):
            host -= event.self_cpu_time_total / 1e6
    kernels = dict(sorted((kernels or operations).items(), key=lambda item: -item[1]))
    return Profiled(operations=operations, kernels=kernels, device=sum(kernels.values()), host=max(host, 0.0))


def _waits(call: str) -> bool:
    return any(word in call for word in WAITS) and not call.endswith("Async")

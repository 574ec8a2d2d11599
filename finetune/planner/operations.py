"""The operations that a device is asked for, as bytes and floating-point operations, and how long each takes there.

An operation is what torch hands to the device: one kernel, or a few that follow each other. It takes as long as its
bytes need, or its operations, or a kernel at least, whichever is longest. Loads no torch.

Letters of the formulas, here and in the files that use them: t tokens, d hidden, e experts, f expert hidden, k top-k,
p patches, v vocabulary, q and k elements of queries and keys, r LoRA rank, n chunks; b bytes of an activation.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from finetune.planner.gpus import Gpu

Kind = Literal["pointwise", "attention", "grouped_mm", "dense mm", "row permutes", "routing"]
WIDE = 4
"""Bytes of a float32."""
KERNEL = 2.5e-6
"""Seconds that a kernel takes at least, until the next one starts; estimated, not measured."""
SORT = 45e-6
"""Seconds that a sort takes at least, as several kernels."""
TOP_K = 30e-6
"""Seconds that a top-k takes at least, as several kernels."""


class Op(NamedTuple):
    """`times` operations that are alike: bytes read and written, floating-point operations, each of one of them."""

    kind: Kind
    bytes: float
    flops: float = 0.0
    times: int = 1
    least: float = KERNEL


class Trains(Protocol):
    """How linear layers train: a section of `adapters`."""

    @property
    def mode(self) -> str:
        """frozen, lora or full."""
        ...

    @property
    def r(self) -> int:
        """Rank of its LoRA."""
        ...


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What a part of the model asks for in one micro-batch: forward, what of it is computed again, backward."""

    forward: list[Op] = field(default_factory=list)
    again: list[Op] = field(default_factory=list)
    backward: list[Op] = field(default_factory=list)

    @property
    def every(self) -> list[Op]:
        """All three."""
        return [*self.forward, *self.again, *self.backward]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of a device, once by the kind of operation and once by what limits it; and how many operations."""

    kinds: dict[str, float]
    limits: dict[str, float]
    launches: int


def touch(size: float, *bytes_each: float) -> list[Op]:
    """Return pointwise operations and reductions over `size` elements, by the bytes that each moves an element."""
    return [Op("pointwise", size * each) for each in bytes_each if each]  # no bytes: no operation


def cast(b: int) -> int:
    """Bytes an element of a conversion to float32 or from it; 0 where it is float32 already and nothing happens."""
    return 0 if b == WIDE else b + WIDE


def mm(rows: float, into: float, out: float, b: int) -> Op:
    """[rows, into] by [into, out]."""
    return Op("dense mm", b * (rows * into + into * out + rows * out), 2 * rows * into * out)


def grouped(rows: float, into: float, out: float, experts: int, b: int) -> Op:
    """The same, each expert's rows by its own matrix."""
    return Op("grouped_mm", b * (rows * into + experts * into * out + rows * out), 2 * rows * into * out)


def outer(rows: float, out: float, into: float, experts: int, b: int) -> Op:
    """The gradient of such matrices."""
    return Op("grouped_mm", b * (rows * (into + out) + experts * into * out), 2 * rows * into * out)


def routing(number: int, size: float = 0.0) -> Op:
    """Return some small operations on indices, each over `size` bytes."""
    return Op("routing", size, times=number)


def permuted(rows: float, width: float, b: int) -> Op:
    """Rows in another order."""
    return Op("row permutes", rows * (2 * width * b + 8))


def linear(rows: float, into: float, out: float, b: int, adapter: Trains) -> list[Op]:
    """A projection, with PEFT's low-rank part beside it."""
    ops = [mm(rows, into, out, b)]
    if adapter.mode == "lora":
        ops += [mm(rows, into, adapter.r, b), mm(rows, adapter.r, out, b), *touch(rows * out, 2 * b, 3 * b)]
    return ops


def linear_again(rows: float, into: float, out: float, b: int, adapter: Trains) -> list[Op]:
    """What a second pass computes of its last projection: all, as a node saves at its end; without LoRA none saves."""
    return linear(rows, into, out, b, adapter) if adapter.mode == "lora" else []


def linear_back(rows: float, into: float, out: float, b: int, adapter: Trains, *, down: bool = True) -> list[Op]:
    """Its gradients: `down` to its input, and those of what trains."""
    ops = [mm(rows, out, into, b)] if down else []
    if adapter.mode == "full":
        ops.append(mm(out, rows, into, b))
    if adapter.mode == "lora":
        r = adapter.r
        ops += [*touch(rows * out, 2 * b), mm(out, rows, r, b), mm(rows, out, r, b), mm(r, rows, into, b)]
        ops += [mm(rows, r, into, b), *touch(rows * into, 3 * b)] if down else []
    return ops


def norm(size: float, rows: float, b: int) -> list[Op]:
    """transformers' RMS norm in float32: wide, squared, mean, times the root's inverse, narrow, times the weight."""
    return touch(size, cast(b), 2 * WIDE, WIDE, 2 * WIDE, cast(b), 2 * b) + touch(rows, 2 * WIDE, 2 * WIDE)


def norm_back(size: float, rows: float, b: int, *, full: bool) -> list[Op]:
    """The two gradients of its input, and their sum; the weight's gradient if it trains."""
    weight = touch(size, 2 * WIDE, cast(b), 3 * b, b) if full else []
    of_input = touch(size, 2 * b, cast(b), cast(b), 3 * WIDE, WIDE, 2 * WIDE, 2 * WIDE, 3 * WIDE, cast(b))
    return [*of_input, *touch(rows, 2 * WIDE, 3 * WIDE, 2 * WIDE), *weight]


def turn(size: float, table: float, b: int) -> list[Op]:
    """Rotary positions, there or back: times cosines, halves changed and times sines, added; `table` of either."""
    times = Op("pointwise", 2 * b * size + b * table)
    return [times, times, *touch(size, 2 * b, 3 * b)]


def spent(ops: Iterable[tuple[Op, int]], gpu: Gpu, *, local_experts: int) -> Spent:
    """Return how long a device takes for operations, each repeated as often as the number with it says."""
    kinds, limits = defaultdict[str, float](float), defaultdict[str, float](float)
    launches = 0
    shares = {"attention": gpu.kernels.attention, "grouped_mm": gpu.kernels.grouped}
    for op, repeats in ops:
        number = op.times * repeats
        if op.kind == "grouped_mm" and not gpu.kernels.has_grouped_mm:
            op = op._replace(bytes=op.bytes / local_experts, flops=op.flops / local_experts)
            number *= local_experts
        rate = gpu.flops * shares.get(op.kind, gpu.kernels.dense)
        took = {"memory": op.bytes / gpu.reached_memory_rate, "compute": op.flops / rate, "small kernels": op.least}
        limit = max(took, key=lambda name: took[name])
        kinds[op.kind] += number * took[limit]
        limits[limit] += number * took[limit]
        launches += number
    return Spent(kinds=dict(kinds), limits=dict(limits), launches=launches)

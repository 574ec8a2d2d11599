"""The operations of a device, as bytes and floating-point operations, and the time that each of them takes.

An operation is what torch launches on the device: one kernel, or a few in sequence. Its time is the longest of three:
the time for its bytes, the time for its arithmetic, and the least time of a kernel. Loads no torch.

Variables of the formulas, here and in the files that use them: t tokens, d hidden, e experts, f expert hidden, k top-k,
p patches, v vocabulary, q and k elements of queries and keys, r LoRA rank, n chunks; b bytes of an activation.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from finetune.config import Bits
from finetune.planner.gpus import Gpu
from moe.kernels.packed import Packing

Kind = Literal["pointwise", "attention", "grouped_mm", "dense mm", "row permutes", "routing"]
WIDE = 4
"""Bytes of a float32."""
KERNEL = 2.5e-6
"""Least seconds of a kernel, until the next one starts; estimated, not measured."""
SORT = 45e-6
"""Least seconds of a sort, which is several kernels."""
TOP_K = 30e-6
"""Least seconds of a top-k, which is several kernels."""


class Op(NamedTuple):
    """`times` identical operations, with the bytes read and written and the floating-point operations of one."""

    kind: Kind
    bytes: float
    flops: float = 0.0
    times: int = 1
    least: float = KERNEL


class Trains(Protocol):
    """The way linear layers train: a section of `adapters`."""

    @property
    def mode(self) -> str:
        """Return frozen, lora or full."""
        ...

    @property
    def r(self) -> int:
        """Return the rank of its LoRA."""
        ...


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Operations of a part of the model in one micro-batch: forward, recomputation, backward."""

    forward: list[Op] = field(default_factory=list)
    again: list[Op] = field(default_factory=list)
    backward: list[Op] = field(default_factory=list)

    @property
    def every(self) -> list[Op]:
        """Return the operations of all three passes."""
        return [*self.forward, *self.again, *self.backward]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of a device by kind of operation and by limit, and the number of operations."""

    kinds: dict[str, float]
    limits: dict[str, float]
    launches: int


def touch(size: float, *bytes_each: float) -> list[Op]:
    """Return pointwise operations and reductions over `size` elements; `bytes_each` are bytes per element."""
    return [Op("pointwise", size * each) for each in bytes_each if each]  # no bytes: no operation


def cast(b: int) -> int:
    """Return the bytes per element of a conversion to or from float32; 0 if the tensor is float32 already."""
    return 0 if b == WIDE else b + WIDE


def mm(rows: float, into: float, out: float, b: int) -> Op:
    """Return the product of [rows, into] and [into, out]."""
    return Op("dense mm", b * (rows * into + into * out + rows * out), 2 * rows * into * out)


def unpacked(matrices: int, out: int, into: int, b: int, bits: Bits) -> list[Op]:
    """Return the fused kernel that unpacks quantised matrices."""
    if bits == "none":
        return []
    packing = Packing(bits=bits, out=out, into=into)
    return [Op("pointwise", matrices * (packing.row_bytes + b * packing.weights))]


def grouped(rows: float, into: float, out: float, experts: int, b: int) -> Op:
    """Return the grouped product, in which each expert's rows are multiplied by its own matrix."""
    return Op("grouped_mm", b * (rows * into + experts * into * out + rows * out), 2 * rows * into * out)


def outer(rows: float, out: float, into: float, experts: int, b: int) -> Op:
    """Return the gradient of the matrices of a grouped product."""
    return Op("grouped_mm", b * (rows * (into + out) + experts * into * out), 2 * rows * into * out)


def routing(number: int, size: float = 0.0) -> Op:
    """Return some small operations on indices, each over `size` bytes."""
    return Op("routing", size, times=number)


def permuted(rows: float, width: float, b: int) -> Op:
    """Return a permutation of rows."""
    return Op("row permutes", rows * (2 * width * b + 8))


def linear(rows: float, into: float, out: float, b: int, adapter: Trains) -> list[Op]:
    """Return a projection and, in mode lora, PEFT's low-rank part."""
    ops = [mm(rows, into, out, b)]
    if adapter.mode == "lora":
        ops += [mm(rows, into, adapter.r, b), mm(rows, adapter.r, out, b), *touch(rows * out, 2 * b, 3 * b)]
    return ops


def linear_again(rows: float, into: float, out: float, b: int, adapter: Trains) -> list[Op]:
    """Return the last projection as a second pass computes it: completely with LoRA, not at all without.

    A second pass ends at the last saved tensor, which LoRA's node saves at its end.
    """
    return linear(rows, into, out, b, adapter) if adapter.mode == "lora" else []


def linear_back(rows: float, into: float, out: float, b: int, adapter: Trains, *, down: bool = True) -> list[Op]:
    """Return the gradients of a projection: of its input if `down`, and of its trained parameters."""
    ops = [mm(rows, out, into, b)] if down else []
    if adapter.mode == "full":
        ops.append(mm(out, rows, into, b))
    if adapter.mode == "lora":
        r = adapter.r
        ops += [*touch(rows * out, 2 * b), mm(out, rows, r, b), mm(rows, out, r, b), mm(r, rows, into, b)]
        ops += [mm(rows, r, into, b), *touch(rows * into, 3 * b)] if down else []
    return ops


def norm(size: float, rows: float, b: int) -> list[Op]:
    """Return transformers' RMS norm in float32: cast, square, mean, inverse root, scale, cast back, weight."""
    return touch(size, cast(b), 2 * WIDE, WIDE, 2 * WIDE, cast(b), 2 * b) + touch(rows, 2 * WIDE, 2 * WIDE)


def norm_back(size: float, rows: float, b: int, *, full: bool) -> list[Op]:
    """Return the two gradients of a norm's input, and their sum; the gradient of its weight if `full`."""
    weight = touch(size, 2 * WIDE, cast(b), 3 * b, b) if full else []
    of_input = touch(size, 2 * b, cast(b), cast(b), 3 * WIDE, WIDE, 2 * WIDE, 2 * WIDE, 3 * WIDE, cast(b))
    return [*of_input, *touch(rows, 2 * WIDE, 3 * WIDE, 2 * WIDE), *weight]


def turn(size: float, table: float, b: int) -> list[Op]:
    """Return the rotation by positions, or its backward; `table` is the number of cosines, and of sines."""
    times = Op("pointwise", 2 * b * size + b * table)
    return [times, times, *touch(size, 2 * b, 3 * b)]


def spent(ops: Iterable[tuple[Op, int]], gpu: Gpu, *, local_experts: int) -> Spent:
    """Return the time a device needs for the operations, each repeated the number of times given with it."""
    kinds, limits = defaultdict[str, float](float), defaultdict[str, float](float)
    launches = 0
    shares = {"attention": gpu.kernels.attention, "grouped_mm": gpu.kernels.grouped}
    for op, repeats in ops:
        number = op.times * repeats
        if op.kind == "grouped_mm" and not gpu.has_grouped_mm:
            op = op._replace(bytes=op.bytes / local_experts, flops=op.flops / local_experts)
            number *= local_experts
        rate = gpu.flops * shares.get(op.kind, gpu.kernels.dense)
        took = {"memory": op.bytes / gpu.reached_memory_rate, "compute": op.flops / rate, "small kernels": op.least}
        limit = max(took, key=lambda name: took[name])
        kinds[op.kind] += number * took[limit]
        limits[limit] += number * took[limit]
        launches += number
    return Spent(kinds=dict(kinds), limits=dict(limits), launches=launches)

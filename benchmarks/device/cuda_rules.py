"""CUDA's requirements of operations, checked on any device, for the second device of the tests.

Each rule comes from torch's source, from a kernel or its host code; checking it needs no GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

GROUPED = aten._grouped_mm.default
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten.copy.default, aten._to_copy.default}

SIZE_UNKNOWN = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
"""Operations whose output shape depends on values, so that the host waits before allocating it."""

ASKS_VALUE = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
"""Operations behind `.item()`, `int(...)`, `bool(...)` and torch.equal."""

CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
"""Convolutions over patches: cuDNN takes seconds for one, and 9.20 has no backward for them."""

GROUPS = 1024
UNIT_BYTES = 16


class Refused(RuntimeError):
    """CUDA would reject this operation, or would read outside of its memory."""


def waits_for_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the host needs values of the device's tensors before it can queue the operation."""
    if func in INDEXED:
        fills = len(args) > 2 and args[2].numel() == 1  # one value for one mask: a masked fill of known shape
        return not fills and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return func in SIZE_UNKNOWN or func in ASKS_VALUE


def require_grouped(a: Tensor, b: Tensor, offs: Tensor | None) -> None:
    """Raise where the grouped GEMM would: rows must start at, and be spaced by, multiples of 16 bytes."""
    for matrix in (a, b):
        rows, columns = matrix.dim() - 2, matrix.dim() - 1
        stride, size = matrix.stride(), matrix.shape
        if matrix.storage_offset() * matrix.element_size() % UNIT_BYTES:
            raise Refused(f"grouped_mm: {list(size)} starts {matrix.storage_offset()} elements into its memory")
        if stride[columns] == 1 and stride[rows] >= max(1, size[columns]):
            leading = stride[rows]
        elif stride[rows] == 1 and stride[columns] >= max(1, size[rows]):
            leading = stride[columns]
        else:
            raise Refused(f"grouped_mm: {list(size)} with strides {stride} is neither row- nor column-major")
        if leading * matrix.element_size() % UNIT_BYTES:
            raise Refused(f"grouped_mm: rows of {list(size)} lie {leading * matrix.element_size()} bytes apart")
    if offs is not None and (offs.dtype != torch.int32 or len(offs) >= GROUPS):
        raise Refused(f"grouped_mm: {len(offs)} offsets of {offs.dtype}")


def require_varlen(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, longest: int) -> None:
    """Raise where the kernel for variable lengths would, and for borders that do not end with the row."""
    if cuts.dtype != torch.int32:
        raise Refused(f"varlen_attn: borders of {cuts.dtype}")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise Refused(f"varlen_attn: strides {q.stride()}, {k.stride()}, {v.stride()}")
    if q.shape[1] % k.shape[1]:
        raise Refused(f"varlen_attn: {q.shape[1]} heads over {k.shape[1]}")
    lengths = cuts.diff()
    if int(cuts[-1]) != len(q) or int(cuts[0]) or int(lengths.min()) < 0 or int(lengths.max()) > longest:
        raise Refused(f"varlen_attn: borders {cuts.tolist()}, none longer than {longest}, of {len(q)} tokens")

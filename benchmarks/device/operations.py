"""Count the operations that torch launches on a device, with their bytes and floating-point operations, by kind.

Works on the meta device, where nothing is computed, on the modules' own calls. Views do not count, a broadcast tensor
is read once, and an operation that writes into given memory does not read it.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.planner.operations import Kind

NOTHING = frozenset(
    (
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "reshape",
        "transpose",
        "t",
        "permute",
        "slice",
        "select",
        "expand",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "unbind",
        "chunk",
        "as_strided",
        "unfold",
        "diagonal",
        "narrow",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "lift_fresh",
        "is_same_size",
        "sym_size",
        "sym_numel",
        "_local_scalar_dense",
        "set_",
        "resize_",
    )
)
FILLS = frozenset(("fill_", "zero_", "zeros", "zeros_like", "new_zeros", "full", "full_like", "ones", "arange"))
PARTS = frozenset(("slice_backward", "select_backward"))
"""Operations that fill with zeros and then overwrite a part: two launches."""
GATHERS = frozenset(("index_select", "gather", "embedding", "index"))


@dataclass
class Count:
    """Operations of one kind."""

    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """A context that counts; a grouped product reads as large a share of the matrices as it has of `rows`."""

    def __init__(self, *, rows: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.kinds: dict[Kind, Count] = defaultdict(Count)

    @property
    def launches(self) -> int:
        """Launches of all kinds."""
        return sum(count.launches for count in self.kinds.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in NOTHING:
            return out
        read = [x for key, x in (kwargs or {}).items() if key != "out"]
        ins = [x for x in tree_leaves((args, read)) if isinstance(x, Tensor)]
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        count = self.kinds[_kind(name, outs)]
        count.launches += 2 if name in PARTS else 1
        count.bytes += _bytes(name, ins, outs, self.rows)
        count.flops += _flops(name, ins)
        return out


def _kind(name: str, outs: list[Tensor]) -> Kind:
    if "grouped_mm" in name:
        return "grouped_mm"
    if name in ("mm", "addmm", "convolution"):
        return "dense mm"
    if "attn" in name or "attention" in name:
        return "attention"
    if name in ("index_select", "bmm"):
        return "row permutes"
    indices = not any(x.is_floating_point() for x in outs)
    return "routing" if indices or name in ("topk", "sort") else "pointwise"


def _bytes(name: str, ins: list[Tensor], outs: list[Tensor], rows: int) -> float:
    written = sum(map(_size, outs))
    if name in FILLS:
        return written
    if name in PARTS:
        return written + 2 * _size(ins[0])
    if name in ("copy_", "_to_copy", "clone"):
        return _size(ins[-1]) + written
    if name in GATHERS:
        return 2 * written + _size(ins[-1])
    if name in ("scatter_", "scatter_add_"):
        return 2 * _size(ins[2]) + _size(ins[1])
    read = float(sum(map(_size, ins)))
    if name == "_grouped_mm" and ins[1].ndim == 3 and rows:
        read += _size(ins[1]) * (ins[0].shape[0] / rows - 1)
    return read + written


def _size(x: Tensor) -> int:
    """Return the bytes in memory; a broadcast dim counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.element_size()


def _flops(name: str, ins: list[Tensor]) -> float:
    """Return the operations of a product; those of attention depend on its borders and are not counted."""
    if name in ("mm", "addmm"):
        a, b = ins[-2:]
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if name == "bmm":
        return 2 * ins[0].numel() * ins[1].shape[2]
    return 2 * ins[0].shape[0] * ins[0].shape[1] * ins[1].shape[-1] if name == "_grouped_mm" else 0

"""Count collectives as they are issued, by operation, number of ranks, data type and bytes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True, order=True)
class Kind:
    """A kind of collective: `ranks` is the size of its group, `dtype` the type of its data."""

    collective: str
    ranks: int
    dtype: str


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Count the calls and bytes of every collective that this rank issues in the block, DeepSpeed's and ours.

    Bytes are those of the operation's larger side on this rank: the output of an all-gather, the input of a
    reduce-scatter, the data sent by an all-to-all (including the part that stays here, which `leaving` excludes).
    The backward pass of a CPU graph runs on the same thread and is counted too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.calls: Counter[Kind] = Counter()
        self.bytes: Counter[Kind] = Counter()
        self.leaving: Counter[Kind] = Counter()
        """Bytes of all-to-alls that go to other ranks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record it if it is a collective."""
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space in ("c10d", "_c10d_functional") and not any(word in name for word in ("wait", "wrap", "barrier")):
            self._record(name, args)
        return out

    def _record(self, name: str, args: Any) -> None:
        leaves = tree_leaves(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        first, last = args[0], args[1] if len(args) > 1 else None
        sides = [_bytes(side) for side in (first, last) if _bytes(side)]
        kind = Kind(
            collective=name.strip("_").removesuffix("_base").removesuffix("_into_tensor"),
            ranks=next(size for leaf in leaves if (size := _group_size(leaf))),
            dtype=str(tensors[0].dtype).removeprefix("torch."),
        )
        self.calls[kind] += 1
        self.bytes[kind] += max(sides, default=0)
        if name == "all_to_all_single":  # its arguments: rows, sizes to receive, sizes to send, group
            group, sent = _group(args[3]), args[2]
            assert group is not None
            here = sent[group.rank()] / max(1, sum(sent))
            self.leaving[kind] += round(_bytes(first) * (1 - here))

    def total(self, *collectives: str, floating: bool = True) -> int:
        """Return the bytes of the named collectives, for floating-point data only unless `floating` is False."""
        kinds = [k for k in self.bytes if k.collective in collectives and (not floating or "float" in k.dtype)]
        return sum(self.bytes[kind] for kind in kinds)


def _bytes(side: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(side) if isinstance(leaf, Tensor))


def _group_size(leaf: Any) -> int:
    """Return the size of the process group that an argument names, or 0."""
    if isinstance(leaf, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(leaf).size()
        except RuntimeError:
            return 0
    if isinstance(leaf, str):
        return 0 if (group := _group(leaf)) is None else group.size()
    return leaf.size() if isinstance(leaf, dist.ProcessGroup) else 0


def _group(name: str) -> dist.ProcessGroup | None:
    return next((group for group in _groups() if group.group_name == name), None)


def _groups() -> list[dist.ProcessGroup]:
    return [group for group in dist.distributed_c10d._pg_map if isinstance(group, dist.ProcessGroup)]

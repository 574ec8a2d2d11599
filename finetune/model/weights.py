"""Loads weights from files into partitioned ranks: one rank reads each tensor, shares it, and frees it before the next.

The reader of a tensor is the first rank of its group: the world for dense weights, the expert-data group (the ranks
that hold the same experts) for expert stacks, of which a rank gets only its own experts. A frozen resident weight goes
into its buffer, any other parameter straight into ZeRO's partitioning. In addition to the weights it keeps, a rank
holds one tensor and one block of bytes from the file, whatever the model's size.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from finetune.files.basefiles import BaseFiles
from finetune.model.empty import EmptyModel
from finetune.model.lora import initial_factor
from finetune.model.sources import Source, StartValues
from finetune.ranks.collectives import rank_and_world
from finetune.ranks.engine import engine_device, gathered
from moe.experts import GroupedExperts
from moe.kernels.linear import PackedLinear
from moe.kernels.packed import Packing
from moe.router import Router

QUANTISED_ERROR = 0.5
"""Largest relative difference of a quantised row from the file: 0.1 is usual in nf4, 1.4 for another row's values."""
BLOCK_BYTES = 40 * 2**20
"""Bytes that were read in memory at once; just above the largest block that the C library keeps when freed (32 MiB)."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The bytes that this rank read and keeps, and the number of tensors that it read."""

    bytes_read: int
    bytes_held: int
    tensors_read: int


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of the model, and every module that refers to it (more than one if weights are tied)."""

    name: str
    canonical: str
    tensor: Tensor
    owners: list[tuple[nn.Module, str]]

    @property
    def rows(self) -> range | None:
        """The experts of a stack that this rank holds; None for a dense tensor, which is read entirely."""
        owner = self.owners[0][0]
        return owner.local_experts if isinstance(owner, GroupedExperts) else None

    @property
    def packing(self) -> Packing | None:
        """The form of its matrices; None for a tensor that is not packed."""
        owner, name = self.owners[0]
        return owner.packings.get(name) if isinstance(owner, (GroupedExperts, PackedLinear)) else None


def load_weights(
    empty: EmptyModel,
    files: BaseFiles,
    *,
    engine_config: Mapping[str, Any] | None = None,
    start: StartValues | None = None,
) -> LoadReport:
    """Fill a meta model in place; every rank must call this, with the same files and engine config.

    With `engine_config` ZeRO-3 partitions every parameter; without it they stay complete (one process, no engine).
    Tensors in `start` are read from there; any other adapter gets start values that do not depend on the layout.
    """
    if start is not None:
        start.check_fits(empty)
    module = empty.module
    zero = _Partitioner(engine_config) if engine_config is not None else None
    device = engine_device()
    read = count = 0
    for slot in base_slots(empty):
        group, reader = _group(slot)
        is_reader = rank_and_world()[0] == reader
        source = start if start is not None and slot.canonical in start.shapes else files
        made = _put(slot, torch.empty(slot.tensor.shape, dtype=slot.tensor.dtype, device=device))
        if zero is not None and isinstance(made, nn.Parameter):
            if is_reader:
                _fill(made.data, source, slot)
            zero.partition(made)  # broadcasts by itself
        else:
            _share(_place(slot), source, slot, group, reader)
        if is_reader:
            read += source.size(slot.canonical, slot.rows)
            count += 1
        del made  # otherwise this tensor would still be alive while the next one is made
    rebuild_tables(module, device)
    _start_adapters(empty, device, zero, start)
    left = [name for name, tensor in _tensors(module) if tensor.is_meta]
    assert not left, f"still on meta: {left[:4]}"
    check_rows(empty, files, leave=start.shapes if start is not None else ())
    return LoadReport(bytes_read=read, bytes_held=held_bytes(module), tensors_read=count)


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of weights that this rank keeps: complete buffers, and its slices of partitioned parameters."""
    kept = [(getattr(tensor, "ds_tensor", None), tensor) for _, tensor in _tensors(module)]
    return sum(t.numel() * t.element_size() for t in (piece if piece is not None else whole for piece, whole in kept))


def check_rows(empty: EmptyModel, files: BaseFiles, *, leave: Collection[str] = ()) -> None:
    """Compare some rows of some experts on this rank with the file, by the layout's definition.

    A transposed or shifted load changes no shape and no norm; only the values show it. Names in `leave` are skipped.
    """
    layers = [(n, m) for n, m in empty.module.named_modules() if isinstance(m, GroupedExperts)]
    for name, experts in {layer[0]: layer[1] for layer in (layers[:1] + layers[-1:])}.items():
        for key in ("gate_up", "down"):
            canonical = empty.canonical(f"{name}.{key}")
            if canonical not in leave:
                rows = _packed_rows if experts.packings else _held_rows
                for local, row, ours in rows(experts, key):
                    _check_row(ours, files, canonical, experts.local_experts[local], row, exact=not experts.packings)


def _packed_rows(experts: GroupedExperts, key: str) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (local expert, row, values) for some rows of packed matrices that lie on this rank as a whole."""
    packing, packed = experts.packings[key], getattr(experts, key)
    piece, size = getattr(packed, "ds_tensor", None), packing.row_bytes
    start, held = 0, packed.detach() if piece is None else piece
    if piece is not None:
        start = packed.ds_zero_partition_rank * piece.numel()
    first, last = -(-start // size), min(len(experts.local_experts), (start + held.numel()) // size) - 1
    for local in sorted({first, last} if first <= last else ()):
        matrix = held.flatten()[local * size - start :][:size].view(1, size)
        whole = packing.unpack(matrix, torch.empty((1, packing.out, packing.into), device=held.device))[0]
        yield from ((local, row, whole[row]) for row in sorted({0, packing.out // 2, packing.out - 1}))


def _held_rows(experts: GroupedExperts, key: str) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (local expert, row, values) for some rows of a stack on this rank; only of its slice if partitioned."""
    weight = getattr(experts, key)
    piece = getattr(weight, "ds_tensor", None)
    experts, height, width = getattr(weight, "ds_shape", weight.shape)
    start, stop = 0, experts * height * width
    if piece is not None:
        start = weight.ds_zero_partition_rank * piece.numel()
        stop = min(start + piece.numel(), stop)
    first, last = -(-start // width), stop // width - 1  # complete rows only
    for row in sorted({first, (first + last) // 2, last} if first <= last else ()):
        at = row * width - start
        yield (
            row // height,
            row % height,
            weight[row // height, row % height] if piece is None else piece[at : at + width],
        )


def _check_row(ours: Tensor, files: BaseFiles, canonical: str, expert: int, row: int, *, exact: bool) -> None:
    """Compare one output feature, which is a column of the stored matrix in the hub's layout."""
    ours = ours.detach().cpu()
    stored_row = files.out_feature(canonical, expert, row).to(ours.dtype)
    is_near = not exact and (ours - stored_row).norm() <= QUANTISED_ERROR * stored_row.norm()
    if not (is_near or torch.equal(ours, stored_row)):
        apart = (ours.float() - stored_row.float()).abs().max().item()
        raise ValueError(
            f"{files.folder}: {canonical}, expert {expert}: row {row} in memory differs from the file by up to "
            f"{apart:.3g}. Either the file's layout is not {files.layout!r}, or the file changed while it was read: "
            f"check model.layout"
        )


class _Partitioner:
    """Converts a complete parameter into this rank's slice, by ZeRO-3's own code."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.context = deepspeed.zero.Init(config_dict_or_path=dict(config))

    def partition(self, parameter: nn.Parameter) -> None:
        """Broadcast from the group's first rank and keep this rank's slice; every rank must call this."""
        if hasattr(parameter, "ds_zero_partition_group_name"):
            group = groups._get_expert_data_parallel_group(parameter.ds_zero_partition_group_name)
            parameter.ds_zero_partition_process_group = group  # type: ignore[attr-defined]
        self.context._convert_to_zero_parameters([parameter])


def base_slots(empty: EmptyModel) -> Iterator[Slot]:
    """Yield the tensors that the base's files fill, in the model's order."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in empty.module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((owner, name))
    for name, tensor in list(_tensors(empty.module)):
        place, _, last = name.rpartition(".")
        if last in empty.module.get_submodule(place)._non_persistent_buffers_set or ".lora_" in empty.canonical(name):
            continue
        yield Slot(name=name, canonical=empty.canonical(name), tensor=tensor, owners=owners[id(tensor)])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _group(slot: Slot) -> tuple[Any, int]:
    """Return the process group that shares a tensor (None: the world), and the rank that reads it."""
    rank, world = rank_and_world()
    if slot.rows is None or world == 1:
        return None, 0
    owner = slot.owners[0][0]
    assert isinstance(owner, GroupedExperts)
    ep_size = owner.num_experts // len(slot.rows)
    return groups._get_expert_data_parallel_group(f"ep_size_{ep_size}"), rank % ep_size


def _place(slot: Slot) -> Tensor:
    """Return the buffer to fill. Experts make room for their adapter first, or their first forward would copy."""
    owner, name = slot.owners[0]
    if isinstance(owner, GroupedExperts) and owner.lora is not None and name in owner._buffers:
        owner.make_room()
    tensor: Tensor = getattr(owner, name)
    return tensor.data


def _fill(target: Tensor, files: Source, slot: Slot) -> None:
    """Read a tensor block by block into its place."""
    for place, block in _blocks(files, slot):
        target[place].copy_(_read(files, slot, block, target.device))


def _read(files: Source, slot: Slot, rows: range, device: torch.device) -> Tensor:
    """Read some rows, and quantise them where the model holds them packed."""
    values = files.read(slot.canonical, rows)
    if slot.packing is None:
        return values
    matrices = values.to(device).view(-1, slot.packing.out, slot.packing.into)
    return slot.packing.pack(matrices, name=f"{slot.canonical}, from row {rows.start},")


def _share(target: Tensor, files: Source, slot: Slot, group: Any, reader: int) -> None:
    """Send a tensor from its reader to every rank of the group, block by block; every rank of it must call this."""
    for place, block in _blocks(files, slot):
        piece = torch.empty(target[place].shape, dtype=target.dtype, device=target.device)
        if rank_and_world()[0] == reader:
            piece.copy_(_read(files, slot, block, piece.device))
        if dist.is_initialized():
            dist.broadcast(piece, src=reader, group=group)
        target[place].copy_(piece)


def _blocks(files: Source, slot: Slot) -> Iterator[tuple[slice, range]]:
    """Yield where each block of this rank's rows goes, and the rows of the file that it holds."""
    rows = slot.rows or range(files.shapes[slot.canonical][0])
    if slot.packing is not None and slot.rows is None:
        yield slice(0, 1), rows  # a matrix is quantised whole
        return
    step = max(1, BLOCK_BYTES // files.row_bytes(slot.canonical))
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        yield slice(first, first + len(block)), block


def _put(slot: Slot, filled: Tensor) -> Tensor:
    """Set the tensor in every module that refers to it; a parameter stays a parameter and keeps its tags."""
    made = filled
    if isinstance(slot.tensor, nn.Parameter):
        made = nn.Parameter(filled, requires_grad=slot.tensor.requires_grad)
        made.__dict__.update(slot.tensor.__dict__)
    for owner, name in slot.owners:
        setattr(owner, name, made)
    return made


def rebuild_tables(module: nn.Module, device: torch.device) -> None:
    """Compute the tables that no file holds: rotary frequencies, in float32 whatever the model's dtype."""
    for owner in module.modules():
        names = [n for n in owner._non_persistent_buffers_set if (b := owner._buffers[n]) is not None and b.is_meta]
        if not names or isinstance(owner, Router):
            continue
        fresh = type(owner)(owner.config)
        for name in names:
            table = fresh.get_buffer(name).to(device)
            assert table.dtype == torch.float32, f"{type(owner).__name__}.{name} is {table.dtype}"
            setattr(owner, name, table)


def _start_adapters(
    empty: EmptyModel, device: torch.device, zero: _Partitioner | None, start: StartValues | None
) -> None:
    """Give factors their start values, and the router its copy of the base; equal on all ranks that share them."""
    for place, owner in empty.module.named_modules():
        fresh = {f"{place}.{name}": p for name, p in owner._parameters.items() if p is not None and p.is_meta}
        for name, parameter in fresh.items():
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            canonical, last = empty.canonical(name), name.rpartition(".")[2]
            if not isinstance(owner, (GroupedExperts, Router)):  # these make their own values below
                values.copy_(initial_factor(canonical, tuple(values.shape), seed=empty.seed))
            _put(Slot(name=name, canonical=canonical, tensor=parameter, owners=[(owner, last)]), values)
        if isinstance(owner, (GroupedExperts, Router)):
            owner.init_lora()
        if isinstance(owner, Router) and owner.base_weight is not None:
            owner.base_weight = torch.empty_like(owner.base_weight, device=device)
            with gathered(owner.weight):
                owner.keep_base()
        for name in fresh:
            made = empty.module.get_parameter(name)
            if start is not None and empty.canonical(name) in start.factors:
                made.data.copy_(start.factor(empty.canonical(name), owner))
            if zero is not None:
                zero.partition(made)

"""Writing a model folder as the hub has it: sharded safetensors with transposed expert stacks, index, config, files.

Every file's size is known before the first tensor arrives, so each file is reserved on disk at once and each tensor, or
some of an expert stack's rows, goes straight to its place: in memory is one tensor, whatever the model's size, and a
disk too small is known in the first second. The folder is made beside its destination and renamed when it is complete.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture.shapes import Shape, is_expert_stack
from finetune.architecture.yarn import both_spellings
from finetune.files.atomic import whole_folder, write_file
from finetune.files.hubconfig import config_text, to_hub_spelling
from finetune.files.layouts import LAYOUT_KEY, stored_shape
from finetune.files.tensorfile import ITEM_SIZES, make_header

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
_TYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a canonical tensor goes: its file, its first byte there, and what the file's header says of it."""

    file: str
    begin: int
    dtype: str
    stored: Shape
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class WrittenModel:
    """What a finished folder holds."""

    folder: Path
    files: int
    tensors: int
    weight_bytes: int


@dataclass(kw_only=True)
class ModelWriter:
    """Takes tensors in any order, whole or by expert rows, until every byte of every file was written once."""

    folder: Path
    places: Mapping[str, _Place]
    handles: Mapping[str, int]
    missing: dict[str, set[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.missing = {
            name: set(range(place.shape[0] if is_expert_stack(name) else 1)) for name, place in self.places.items()
        }

    def write(self, name: str, tensor: torch.Tensor, *, first_row: int = 0) -> None:
        """Write a canonical tensor, or a stack's experts from `first_row` on, as it lies in memory [E, out, in]."""
        place = self._place(name, tensor, first_row)
        units = set(range(first_row, first_row + tensor.shape[0])) if is_expert_stack(name) else {0}
        if not units <= self.missing[name]:
            again = sorted(units - self.missing[name])
            raise ValueError(f"{name} was handed over twice" + (f" (experts {again})" if is_expert_stack(name) else ""))
        if is_expert_stack(name):
            row = math.prod(place.stored[1:]) * ITEM_SIZES[place.dtype]
            for expert in range(tensor.shape[0]):  # one matrix at a time: the transposed copy stays small
                self._put(place, (first_row + expert) * row, tensor[expert].t())
        else:
            self._put(place, 0, tensor)
        self.missing[name] -= units

    def check_complete(self) -> None:
        """Raise unless everything that the model needs was written."""
        left = {name: units for name, units in self.missing.items() if units}
        if left:
            shown = [
                f"{name} (experts {_ranges(units)})" if is_expert_stack(name) else name
                for name, units in list(left.items())[:8]
            ]
            raise ValueError(
                f"{len(left)} of {len(self.places)} tensors were never handed over or only in part: {', '.join(shown)}"
                f"{', ...' if len(left) > 8 else ''}. Nothing was written to {self.folder}"
            )

    def _place(self, name: str, tensor: torch.Tensor, first_row: int) -> _Place:
        if name not in self.places:
            raise ValueError(f"{name} is not a parameter of this model; nothing was written to {self.folder}")
        place = self.places[name]
        dtype = _TYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
        fits = tuple(tensor.shape) == place.shape
        if is_expert_stack(name):
            fits = tuple(tensor.shape[1:]) == place.shape[1:] and first_row + tensor.shape[0] <= place.shape[0]
        if not fits or dtype != place.dtype:
            raise ValueError(
                f"{name} must be {place.dtype} {list(place.shape)}, was handed over as {dtype or tensor.dtype} "
                f"{list(tensor.shape)}" + (f" from expert {first_row} on" if first_row else "")
            )
        return place

    def _put(self, place: _Place, offset: int, tensor: torch.Tensor) -> None:
        import torch

        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        view, done = raw.numpy().data, 0
        while done < len(view):
            done += os.pwrite(self.handles[place.file], view[done:], place.begin + offset + done)


@contextmanager
def model_writer(
    folder: Path,
    *,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | str,
    config: Mapping[str, Any],
    side_files: Mapping[str, bytes | Path],
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[ModelWriter]:
    """A writer for the model of these canonical shapes; on leaving without an error, the folder is whole and in place.

    `dtypes` are safetensors type names, one for all or by canonical name. `side_files` are copied or written beside the
    weights. Any error leaves nothing under `folder` and removes what was written beside it.
    """
    with whole_folder(folder) as beside:
        handles: dict[str, int] = {}
        try:
            places = _reserve(beside, handles, shapes, dtypes, shard_bytes)
            writer = ModelWriter(folder=folder, places=places, handles=handles)
            yield writer
            writer.check_complete()
            for handle in handles.values():
                os.fsync(handle)
        finally:
            for handle in handles.values():
                os.close(handle)
        for name, content in side_files.items():
            write_file(beside / name, content if isinstance(content, bytes) else content.read_bytes())
        # The config comes last: without it no reader takes a folder for a model.
        write_file(beside / "config.json", config_text(both_spellings(to_hub_spelling(dict(config)))).encode())


def write_model(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | str,
    config: Mapping[str, Any],
    side_files: Mapping[str, bytes | Path],
    shard_bytes: int = SHARD_BYTES,
) -> WrittenModel:
    """Write a whole model from an iterator of canonical names and tensors, one of which is in memory at a time."""
    with model_writer(
        folder, shapes=shapes, dtypes=dtypes, config=config, side_files=side_files, shard_bytes=shard_bytes
    ) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
            del tensor  # or it would be held while the next one is made
    return WrittenModel(
        folder=folder,
        files=len({place.file for place in writer.places.values()}),
        tensors=len(writer.places),
        weight_bytes=sum(math.prod(place.shape) * ITEM_SIZES[place.dtype] for place in writer.places.values()),
    )


def side_files_of(base: Path) -> dict[str, bytes | Path]:
    """Every file of a model folder that is neither weights nor config.json: tokenizer, template, processor, licence."""
    found: dict[str, bytes | Path] = {}
    for path in sorted(base.rglob("*")):
        inner = path.relative_to(base)
        hidden = any(part.startswith(".") for part in inner.parts)  # .cache, .git: the download's, not the model's
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHT_SUFFIXES) and str(inner) != "config.json":
            found[str(inner)] = path
    return found


def plan_shards(
    tensors: Mapping[str, tuple[str, Shape]], shard_bytes: int = SHARD_BYTES
) -> dict[str, dict[str, tuple[str, Shape]]]:
    """File name -> (dtype, shape) by name. A file closes when the next tensor would exceed `shard_bytes`."""
    groups: list[dict[str, tuple[str, Shape]]] = [{}]
    used = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * ITEM_SIZES[dtype]
        if groups[-1] and used + size > shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = (dtype, shape)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{at:05d}-of-{len(groups):05d}.safetensors": group for at, group in enumerate(groups, start=1)}


def _reserve(
    beside: Path,
    handles: dict[str, int],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | str,
    shard_bytes: int,
) -> dict[str, _Place]:
    """Make every weight file at its full size with its header, and the index where there are several."""
    kinds = {name: dtypes if isinstance(dtypes, str) else dtypes[name] for name in shapes}
    stored = {name: (kinds[name], stored_shape(name, shape, "hub")) for name, shape in shapes.items()}
    plan, places = plan_shards(stored, shard_bytes), {}
    for file, tensors in plan.items():
        header, begins = make_header(tensors, {"format": "pt", LAYOUT_KEY: "hub"})
        size = len(header) + sum(math.prod(shape) * ITEM_SIZES[dtype] for dtype, shape in tensors.values())
        handles[file] = os.open(beside / file, os.O_RDWR | os.O_CREAT, 0o644)
        os.posix_fallocate(handles[file], 0, size)
        os.pwrite(handles[file], header, 0)
        for name, (dtype, shape) in tensors.items():
            places[name] = _Place(file=file, begin=begins[name], dtype=dtype, stored=shape, shape=shapes[name])
    if len(plan) > 1:
        total = sum(math.prod(shape) * ITEM_SIZES[dtype] for dtype, shape in stored.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: place.file for name, place in sorted(places.items())},
        }
        write_file(beside / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return places


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> 0-2, 5."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)

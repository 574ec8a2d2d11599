"""Writes a model folder in the hub's layout: sharded safetensors with transposed expert stacks, index, config, files.

The size of every file is known before the first tensor arrives. So each file is reserved on disk at the start, and each
tensor, or some rows of an expert stack, goes straight to its place. Only one tensor is in memory, whatever the model's
size, and a disk that is too small fails in the first second. The folder is made next to its destination and renamed
when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture.shapes import Shape, is_expert_stack
from finetune.architecture.yarn import both_spellings
from finetune.files.atomic import whole_folder, write_file
from finetune.files.fp8 import SCALE, quantise, with_scales
from finetune.files.hubconfig import config_text, to_hub_spelling
from finetune.files.layouts import HUB_METADATA, stored_shape
from finetune.files.tensorfile import FP8, ReservedFile, reserve, tensor_bytes, type_name

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
CHECKSUMS, REPORT = "checksums.sha256", "moetune-merge.json"
"""Files in which a merge describes its own folder."""
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


@dataclass(frozen=True, kw_only=True)
class WrittenModel:
    """The contents of a finished folder."""

    folder: Path
    files: int
    tensors: int
    weight_bytes: int


@dataclass(kw_only=True)
class ModelWriter:
    """Takes tensors in any order, complete or by expert rows, until every byte of every file is written once."""

    folder: Path
    shapes: Mapping[str, Shape]
    files: Mapping[str, ReservedFile]
    """The file of each tensor, by canonical name."""
    missing: dict[str, set[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.missing = {
            name: set(range(shape[0] if is_expert_stack(name) else 1)) for name, shape in self.shapes.items()
        }

    def write(self, name: str, tensor: torch.Tensor, *, first_row: int = 0) -> None:
        """Write a canonical tensor, or a stack's experts starting at `first_row`, as in memory [E, out, in]."""
        self._check(name, tensor, first_row)
        file = self.files[name]
        units = set(range(first_row, first_row + tensor.shape[0])) if is_expert_stack(name) else {0}
        if not units <= self.missing[name]:
            again = sorted(units - self.missing[name])
            raise ValueError(f"{name} was written twice" + (f" (experts {again})" if is_expert_stack(name) else ""))
        if file.tensors[name].dtype == FP8:
            self._quantise(name, tensor if is_expert_stack(name) else tensor[None], first_row)
        elif is_expert_stack(name):
            row_size = file.tensors[name].row_size
            for expert in range(tensor.shape[0]):  # one matrix at a time: the transposed copy stays small
                file.put(name, tensor[expert].t(), (first_row + expert) * row_size)
        else:
            file.put(name, tensor)
        self.missing[name] -= units

    def _quantise(self, name: str, matrices: torch.Tensor, first: int) -> None:
        """Write the codes and the scales of float32 matrices, the first of which has this number in its tensor."""
        for at, matrix in enumerate(matrices, start=first):
            pair = quantise(matrix.t() if is_expert_stack(name) else matrix)
            for key, part in zip((name, name + SCALE), pair, strict=True):
                self.files[key].put(key, part, at * part.nbytes)

    def check_complete(self) -> None:
        """Raise ValueError unless every tensor of the model was written."""
        left = {name: units for name, units in self.missing.items() if units}
        if left:
            shown = [
                f"{name} (experts {_ranges(units)})" if is_expert_stack(name) else name
                for name, units in list(left.items())[:8]
            ]
            raise ValueError(
                f"missing or incomplete tensors ({len(left)} of {len(self.shapes)}): {', '.join(shown)}"
                f"{', ...' if len(left) > 8 else ''}. Nothing was written to {self.folder}"
            )

    def _check(self, name: str, tensor: torch.Tensor, first_row: int) -> None:
        if name not in self.shapes:
            raise ValueError(f"{name} is not a parameter of this model; nothing was written to {self.folder}")
        shape, dtype = self.shapes[name], self.files[name].tensors[name].dtype
        fits = tuple(tensor.shape) == shape
        if is_expert_stack(name):
            fits = tuple(tensor.shape[1:]) == shape[1:] and first_row + tensor.shape[0] <= shape[0]
        dtype = "F32" if dtype == FP8 else dtype
        if not fits or type_name(tensor.dtype) != dtype:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)}, got {type_name(tensor.dtype) or tensor.dtype} "
                f"{list(tensor.shape)}" + (f" starting at expert {first_row}" if first_row else "")
            )


@contextmanager
def model_writer(
    folder: Path,
    *,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | str,
    config: Mapping[str, Any],
    side_files: Mapping[str, bytes | Path],
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    metadata: Mapping[str, str] = HUB_METADATA,
) -> Iterator[ModelWriter]:
    """Yield a writer for the model of these shapes; if the block ends without an error, the folder is complete.

    `dtypes` are safetensors type names, one for all or by canonical name; tensors in fp8 are given in float32.
    `side_files` are copied or written next to the weights. After any error `folder` does not exist, and unfinished
    files are removed. With `replace`, `folder` may hold an earlier model, which stays until the new one is complete.
    """
    with whole_folder(folder, replace=replace) as beside:
        with ExitStack() as stack:
            files = _reserve(stack, beside, shapes, dtypes, shard_bytes, metadata)
            writer = ModelWriter(folder=folder, shapes=shapes, files=files)
            yield writer
            writer.check_complete()
        for name, content in side_files.items():
            write_file(beside / name, content if isinstance(content, bytes) else content.read_bytes())
        # The config comes last: without it no reader takes the folder for a model.
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
    metadata: Mapping[str, str] = HUB_METADATA,
) -> WrittenModel:
    """Write a model from an iterator of canonical names and tensors; one tensor is in memory at a time."""
    with model_writer(
        folder,
        shapes=shapes,
        dtypes=dtypes,
        config=config,
        side_files=side_files,
        shard_bytes=shard_bytes,
        metadata=metadata,
    ) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
            del tensor  # otherwise it would stay in memory while the next one is made
    stored = [file.tensors[name] for name, file in writer.files.items()]
    return WrittenModel(
        folder=folder,
        files=len({tensor.file for tensor in stored}),
        tensors=len(stored),
        weight_bytes=sum(tensor.size for tensor in stored),
    )


def side_files_of(base: Path) -> dict[str, bytes | Path]:
    """List a model folder's files that are neither weights nor config.json: tokenizer, template, processor, licence.

    Files in which a merge described that folder's weights are left out, and so are `links_outside`.
    """
    files: dict[str, bytes | Path] = {}
    outside = links_outside(base)
    for path in sorted(base.rglob("*")):
        inner = path.relative_to(base)
        hidden = any(part.startswith(".") for part in inner.parts)  # .cache, .git: of the download, not of the model
        own = str(inner) in ("config.json", CHECKSUMS, REPORT) or path.name.endswith(_WEIGHT_SUFFIXES)
        if path.is_file() and not hidden and not own and str(inner) not in outside:
            files[str(inner)] = path
    return files


def links_outside(base: Path) -> list[str]:
    """List links in a model folder to files elsewhere, which may belong to anyone and are never copied.

    A cache of the hub keeps its files in one place and links to them, so links to the folder of config.json are fine.
    """
    places = (base.resolve(), (base / "config.json").resolve().parent)
    links = [path for path in sorted(base.rglob("*")) if path.is_file()]
    return [str(p.relative_to(base)) for p in links if not any(p.resolve().is_relative_to(place) for place in places)]


def plan_shards(
    tensors: Mapping[str, tuple[str, Shape]], shard_bytes: int = SHARD_BYTES
) -> dict[str, dict[str, tuple[str, Shape]]]:
    """Return file name -> its tensors as (dtype, shape) by name; a file ends before it would exceed `shard_bytes`.

    The scales of an fp8 tensor follow it, in the same file.
    """
    groups: list[dict[str, tuple[str, Shape]]] = [{}]
    used = 0
    for name in tensors:
        if name.endswith(SCALE):
            continue
        together = {key: tensors[key] for key in (name, name + SCALE) if key in tensors}
        size = tensor_bytes(together)
        if groups[-1] and used + size > shard_bytes:
            groups.append({})
            used = 0
        groups[-1] |= together
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{at:05d}-of-{len(groups):05d}.safetensors": group for at, group in enumerate(groups, start=1)}


def _reserve(
    stack: ExitStack,
    beside: Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | str,
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> dict[str, ReservedFile]:
    """Make every weight file at its full size with its header, and the index if there are several files."""
    types = {name: dtypes if isinstance(dtypes, str) else dtypes[name] for name in shapes}
    kinds = {name: (types[name], stored_shape(name, shape, "hub")) for name, shape in shapes.items()}
    shards = plan_shards(with_scales(kinds), shard_bytes)
    files: dict[str, ReservedFile] = {}
    for file, tensors in shards.items():
        reserved = stack.enter_context(reserve(beside / file, tensors, metadata))
        files |= dict.fromkeys(tensors, reserved)
    if len(shards) > 1:
        write_file(beside / INDEX, index_text(shards))
    return files


def index_text(shards: Mapping[str, Mapping[str, tuple[str, Shape]]]) -> bytes:
    """Return the index of a model whose tensors, (dtype, shape) by name, are in several files."""
    total = sum(tensor_bytes(tensors) for tensors in shards.values())
    places = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _ranges(numbers: set[int]) -> str:
    """Return numbers as ranges: {0, 1, 2, 5} -> 0-2, 5."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)

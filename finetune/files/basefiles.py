"""A base's weight files: their tensors, whether those are the complete model, and reading single tensors.

Everything except `BaseFiles.read` looks at headers only, so a damaged or foreign base is refused in seconds, before
any process group or any weight exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.architecture.shapes import Shape, is_expert_stack, parameter_shapes
from finetune.files.fp8 import BLOCK, FORM, SCALE, dequantise, is_fp8, require_sound
from finetune.files.hubconfig import read_family
from finetune.files.jsonblock import load_json
from finetune.files.keycheck import check_keys, check_scales
from finetune.files.layouts import LAYOUT_KEY, Layout, recognise, single_expert
from finetune.files.tensorfile import FP8, ITEM_SIZES, Stored, read_header, read_tensor, torch_type
from finetune.files.writer import INDEX
from finetune.ranks.log import listed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Every tensor in a folder's weight files by key, and the layout named in their metadata, if any."""

    tensors: Mapping[str, Stored]
    layout: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseFiles:
    """A complete base, as it was when opened; reads its tensors by canonical name, in the orientation of memory.

    Tensors in fp8 are read as float32: codes times scales.
    """

    folder: Path
    layout: Layout
    stored: Mapping[str, Stored]
    shapes: Mapping[str, Shape]
    scales: Mapping[str, Stored] = field(default_factory=dict)
    """The scales of each fp8 tensor, by the key of its codes."""

    @property
    def dtypes(self) -> dict[str, str]:
        """The safetensors type by canonical name, as the writer takes it."""
        return {name: self._parts(name, 0)[0].dtype for name in self.shapes}

    @property
    def quantised(self) -> str:
        """The form of quantised weights in words; "" for a base that is not quantised."""
        return FORM if self.scales else ""

    def row_bytes(self, name: str) -> int:
        """Return the bytes in memory of one row of a tensor that was read."""
        part = self._parts(name, 0)[0]
        return math.prod(self.shapes[name][1:]) * (4 if part.dtype == FP8 else ITEM_SIZES[part.dtype])

    def size(self, name: str, rows: range | None = None) -> int:
        """Return the bytes to read from the disk for `rows` of a tensor, or for all of it."""
        rows = range(self.shapes[name][0]) if rows is None else rows
        if self.layout == "per_expert" and is_expert_stack(name):
            return len(rows) * sum(part.size + self._scale_size(part) for part in self._parts(name, 0))
        stored = self.stored[name]
        scales = self._scale_size(stored, None if len(rows) == stored.shape[0] else rows)
        return len(rows) * stored.row_size + scales

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Read a canonical tensor, or the experts `rows` of a stack, using the memory of one more expert's matrix."""
        import torch

        shape = self.shapes[name]
        rows = range(shape[0]) if rows is None else rows
        if not is_expert_stack(name) or self.layout == "memory":
            return self._values(self.stored[name], rows)
        kind = self._parts(name, 0)[0].dtype
        dtype = torch.float32 if kind == FP8 else torch_type(kind)
        result = torch.empty((len(rows), *shape[1:]), dtype=dtype)
        for at, expert in enumerate(rows):
            if self.layout == "hub":
                result[at] = self._values(self.stored[name], range(expert, expert + 1))[0].t()
            else:
                filled = 0
                for part in self._parts(name, expert):
                    result[at, filled : filled + part.shape[0]] = self._values(part, range(part.shape[0]))
                    filled += part.shape[0]
        return result

    def out_feature(self, name: str, expert: int, row: int) -> torch.Tensor:
        """Read the weights of one output feature of one expert, located by the layout's definition alone."""
        if self.layout == "per_expert":
            parts = self._parts(name, expert)
            height = parts[0].shape[0]
            return self._values(parts[row // height], range(row % height, row % height + 1))[0]
        matrix = self._values(self.stored[name], range(expert, expert + 1))[0]
        return matrix[:, row] if self.layout == "hub" else matrix[row]

    def codes(self, name: str, expert: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Read an fp8 matrix as it is stored, codes and float32 scales, in the orientation of the hub's files.

        It is one expert's of a stack. Gate and up that are stored apart are joined; 128 must divide their height.
        """
        import torch

        if expert is None:
            return read_tensor(self.stored[name]), self._scales(self.stored[name], None)
        if self.layout != "per_expert":
            rows = range(expert, expert + 1)
            pair = read_tensor(self.stored[name], rows)[0], self._scales(self.stored[name], rows)[0]
            return pair if self.layout == "hub" else (pair[0].t(), pair[1].t())
        parts = self._parts(name, expert)
        assert all(part.shape[0] % BLOCK == 0 for part in parts[:-1]), f"{name}: a block would cross two matrices"
        codes = torch.cat([read_tensor(part).view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        return codes.t(), torch.cat([self._scales(part, None) for part in parts]).t()

    def _values(self, stored: Stored, rows: range) -> torch.Tensor:
        """Read rows of a stored tensor; each read takes only the scales that its rows need."""
        tensor = read_tensor(stored, rows)
        if stored.name not in self.scales:
            return tensor
        import torch

        scales = self._scales(stored, rows)
        if len(stored.shape) == 2:
            return dequantise(tensor, scales, rows.start % BLOCK)
        values = torch.empty(tensor.shape)
        for at, matrix in enumerate(tensor):
            values[at] = dequantise(matrix, scales[at])
        return values

    def _scales(self, stored: Stored, rows: range | None) -> torch.Tensor:
        """Read the float32 scales of rows of an fp8 tensor; raise ValueError if one cannot be a scale."""
        scale = self.scales[stored.name]
        values = read_tensor(scale, None if rows is None else _scale_rows(stored, rows)).float()
        require_sound(scale, values.numpy())
        return values

    def _scale_size(self, stored: Stored, rows: range | None = None) -> int:
        """Return the bytes of the scales of rows of a stored tensor: none, unless it is in fp8."""
        scale = self.scales.get(stored.name)
        if scale is None:
            return 0
        return scale.size if rows is None else scale.row_size * len(_scale_rows(stored, rows))

    def _parts(self, name: str, expert: int) -> list[Stored]:
        """Return the stored tensors that make up a canonical tensor, or in per-expert files one expert of it."""
        if self.layout == "per_expert" and is_expert_stack(name):
            return [self.stored[key] for key, _ in single_expert(name, self.shapes[name], expert)]
        return [self.stored[name]]


def open_base(folder: Path, shapes: Mapping[str, Shape] | None = None, *, layout: str = "auto") -> BaseFiles:
    """Open the base in `folder`, after checking from headers only that it is complete and fits its config.json.

    `shapes` are the canonical shapes of the model to be filled; without them a Qwen3-VL is read from the config.json.
    `layout` is `model.layout`: auto, hub, memory or per_expert.
    """
    config = folder / "config.json"
    quantised = config.is_file() and is_fp8(load_json(config), config)
    files = weight_files(folder)
    needed = shapes if shapes is not None else parameter_shapes(read_family(folder))
    tensors = {key: tensor for key, tensor in files.tensors.items() if not (quantised and key.endswith(SCALE))}
    scales = {key.removesuffix(SCALE): files.tensors[key] for key in files.tensors.keys() - tensors.keys()}
    stored = {key: tensor.shape for key, tensor in tensors.items()}
    known = recognise(stored, needed, metadata=files.layout, setting=layout, where=f"the weight files in {folder}")
    check_keys(tensors, needed, known, where=str(folder), fp8=quantised)
    if quantised:
        check_scales(tensors, scales, where=str(folder))
    return BaseFiles(folder=folder, layout=known, stored=tensors, shapes=needed, scales=scales)


def _scale_rows(stored: Stored, rows: range) -> range:
    """Return the rows of the scales that rows of a stored tensor need: experts of a stack, or rows of blocks."""
    return range(rows.start // BLOCK, -(-rows.stop // BLOCK)) if len(stored.shape) == 2 else rows


def weight_files(folder: Path) -> WeightFiles:
    """Read the headers of a folder's weight files; raise one ValueError that names every damaged or missing file."""
    names, mapped = _file_names(folder)
    problems: list[str] = []
    tensors: dict[str, Stored] = {}
    claims: dict[str | None, str] = {}
    for name in names:
        try:
            in_file, metadata = read_header(folder / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        claims.setdefault(metadata.get(LAYOUT_KEY), name)
        twice = sorted(in_file.keys() & tensors.keys())
        if twice:
            problems.append(f"{folder / name} and {tensors[twice[0]].file.name} both hold {listed(twice)}")
        tensors |= in_file
        if mapped is not None:
            problems += _index_problems(folder, name, in_file, mapped)
    if len(claims) > 1:
        layouts = ", ".join(f"{file} {claim or 'none'}" for claim, file in claims.items())
        problems.append(
            f"the files in {folder} name different layouts: {layouts}; they come from two sources. Fetch all of them "
            f"again"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return WeightFiles(tensors=tensors, layout=next(iter(claims), None))


def _file_names(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the weight files to read, and key -> file name if there is an index."""
    present = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not (folder / INDEX).is_file():
        if present == ["model.safetensors"]:
            return present, None
        if present:
            raise ValueError(
                f"{folder} holds weight files ({listed(present)}) but no {INDEX}; it was copied or downloaded only in "
                f"part. Fetch the missing files"
            )
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern))
        hint = f" It holds {listed(others)}, but only safetensors files can be read." if others else ""
        raise ValueError(
            f"{folder} holds no weights: neither model.safetensors nor {INDEX}.{hint} Fetch them, or give another "
            f"folder"
        )
    mapped = load_json(folder / INDEX).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of file names; fetch it again")
    named = sorted(set(mapped.values()))
    absent = [name for name in named if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder / INDEX} names weight files that are missing: {listed(absent)}. "
            f"Fetch them (an interrupted download leaves such a folder)"
        )
    stray = [name for name in present if name not in named]
    if stray:
        raise ValueError(
            f"{folder} holds {listed(stray)}, which {INDEX} does not name: either the folder mixes files of two "
            f"checkpoints, or the index is old. Remove the files that do not belong to it, or fetch the index again"
        )
    return named, mapped


def _index_problems(folder: Path, name: str, in_file: Mapping[str, Stored], mapped: Mapping[str, str]) -> list[str]:
    promised = {key for key, file in mapped.items() if file == name}
    absent, unnamed = sorted(promised - in_file.keys()), sorted(in_file.keys() - promised)
    problems = []
    if absent:
        problems.append(f"{folder / name} lacks {listed(absent)}, which should be there according to {INDEX}")
    if unnamed:
        problems.append(f"{folder / INDEX} does not say that {name} holds {listed(unnamed)}")
    return problems

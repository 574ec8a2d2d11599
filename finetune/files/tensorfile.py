"""The safetensors format by hand: headers, byte ranges, and reading exactly the bytes asked for.

By hand, because a mapped file counts its pages into the resident memory of whoever touches them: reading 100 MB through
the library's mapping raised the peak by far more. Here a read costs the tensor it returns and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture.shapes import Shape

if TYPE_CHECKING:
    import torch

ITEM_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOAT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in one file: `begin` is its first byte, counted from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: Shape
    begin: int

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def row_size(self) -> int:
        """Bytes of one entry of the first dim."""
        return math.prod(self.shape[1:]) * ITEM_SIZES[self.dtype]


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a file and the file's metadata. Checks that the file holds exactly the bytes it announces."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = _LENGTH.unpack(handle.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                f"{file} is not a whole safetensors file: it has {size} bytes and announces a header of {length}. "
                f"It was cut off or is something else; fetch it again"
            )
        try:
            header = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} has a damaged safetensors header ({error}); fetch it again") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file} has a damaged safetensors header (no object with texts as metadata); fetch it again")
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(file, tensors, start=8 + length, size=size)
    return tensors, metadata


def _entry(file: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    try:
        begin, end = entry["data_offsets"]
        found = Stored(name=name, file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), begin=start + begin)
        wrong = found.size != end - begin or begin < 0
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a damaged safetensors header: {name!r} is described by {entry!r}") from error
    if wrong:
        raise ValueError(
            f"{file} has a damaged safetensors header: {name!r} of {found.dtype} {list(found.shape)} needs "
            f"{found.size} bytes, its offsets give {end - begin}"
        )
    return found


def _check_extent(file: Path, tensors: Mapping[str, Stored], *, start: int, size: int) -> None:
    """The tensors lie end to end, and the file ends where the last one does."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.size)):
        if tensor.begin != at:
            raise ValueError(f"{file} has a damaged safetensors header: {tensor.name!r} overlaps or leaves a gap")
        at += tensor.size
    if at != size:
        raise ValueError(
            f"{file} has {size} bytes, its header announces {at}: it was "
            f"{'cut off' if size < at else 'written over'}; fetch it again"
        )


def make_header(tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds (dtype, shape) by name, and the first byte of each tensor in that file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        offsets[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data that starts on a multiple of eight
    return _LENGTH.pack(len(text)) + text, {name: 8 + len(text) + offset for name, offset in offsets.items()}


def read_rows(handle: int, tensor: Stored, rows: range) -> torch.Tensor:
    """Rows of a tensor as they are stored, through an open file descriptor: one buffer of their size, nothing more."""
    import torch

    if tensor.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; weights are read from "
            f"{', '.join(FLOAT_TYPES)} only. A quantised checkpoint cannot be trained; take the original one"
        )
    row_size = tensor.row_size
    raw = torch.empty(len(rows) * row_size, dtype=torch.uint8)
    view, done, at = raw.numpy().data, 0, tensor.begin + rows.start * row_size
    while done < len(view):
        count = os.preadv(handle, [view[done:]], at + done)  # one call returns 2 GiB at most
        if count == 0:
            raise ValueError(f"{tensor.file} ends inside {tensor.name}: it was cut off while it was being read")
        done += count
    return raw.view(getattr(torch, FLOAT_TYPES[tensor.dtype])).reshape(len(rows), *tensor.shape[1:])

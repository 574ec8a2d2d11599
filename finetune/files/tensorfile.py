"""Reads and writes the safetensors format without its library: headers, byte ranges, single tensors and rows.

The library maps the file, and the pages that a process touches count as its resident memory: reading 100 MB through the
mapping raised the peak by far more. Here a read takes the memory of the tensor it returns and no more, and a file
larger than memory is written tensor by tensor, or rows by rows.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from finetune.architecture.shapes import Shape

if TYPE_CHECKING:
    import torch

_TYPES_BY_SIZE = {
    8: ("F64", "I64", "U64"),
    4: ("F32", "I32", "U32"),
    2: ("BF16", "F16", "I16", "U16"),
    1: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
}
ITEM_SIZES = {name: size for size, names in _TYPES_BY_SIZE.items() for name in names}
FLOAT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TYPE_NAMES = {torch_name: name for name, torch_name in FLOAT_TYPES.items()}
FP8 = "F8_E4M3"
"""The type of fp8 codes, which are weights only together with their scales (fp8.py)."""
FP8_VALUES = np.array(
    [
        (-1.0) ** (code >> 7)
        * (math.nan if code & 127 == 127 else math.ldexp(code % 8 + 8 * bool(code & 120), max(code >> 3 & 15, 1) - 10))
        for code in range(256)
    ],
    dtype=np.float32,
)
"""The value of each fp8 code: a sign, four bits of exponent and three of mantissa, with subnormals and NaN."""
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
        """The tensor's bytes on disk."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def row_size(self) -> int:
        """The bytes of one entry of the first dim."""
        return math.prod(self.shape[1:]) * ITEM_SIZES[self.dtype]


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return a file's tensors and metadata, after checking that its size is the one that its header announces."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = _LENGTH.unpack(handle.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                f"{file} is not a complete safetensors file: it has {size} bytes and announces a header of {length}. "
                f"It is cut off or of another format; fetch it again"
            )
        try:
            header = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{file} has a damaged safetensors header ({error}); fetch it again") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file} has a damaged safetensors header (metadata must map to strings); fetch it again")
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(file, tensors, start=8 + length, size=size)
    return tensors, metadata


def _entry(file: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    try:
        begin, end = map(_index, entry["data_offsets"])
        tensor = Stored(
            name=name, file=file, dtype=entry["dtype"], shape=tuple(map(_index, entry["shape"])), begin=start + begin
        )
        wrong = tensor.size != end - begin
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} has a damaged safetensors header: {name!r} is described by {entry!r}; fetch it again"
        ) from error
    if wrong:
        raise ValueError(
            f"{file} has a damaged safetensors header: {name!r} of {tensor.dtype} {list(tensor.shape)} needs "
            f"{tensor.size} bytes, but its offsets give {end - begin}; fetch it again"
        )
    return tensor


def _index(value: Any) -> int:
    """Return `value` if it is a whole number of 0 or more, as lengths and offsets in a file must be."""
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a length")
    return value


def _check_extent(file: Path, tensors: Mapping[str, Stored], *, start: int, size: int) -> None:
    """Raise ValueError unless the tensors lie end to end and the file ends with the last one."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.size)):
        if tensor.begin != at:
            raise ValueError(
                f"{file} has a damaged safetensors header: {tensor.name!r} overlaps another tensor or leaves a gap; "
                f"fetch it again"
            )
        at += tensor.size
    if at != size:
        raise ValueError(
            f"{file} has {size} bytes, but its header announces {at}: it was "
            f"{'cut off' if size < at else 'overwritten'}; fetch it again"
        )


def file_size(kinds: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> int:
    """Return the size in bytes of a file for tensors of (dtype, shape) by name, including its header."""
    return len(_header(kinds, metadata)[0]) + tensor_bytes(kinds)


def tensor_bytes(kinds: Mapping[str, tuple[str, Shape]]) -> int:
    """Return the size in bytes of tensors of (dtype, shape) by name."""
    return sum(math.prod(shape) * ITEM_SIZES[dtype] for dtype, shape in kinds.values())


def _header(kinds: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header for tensors of (dtype, shape) by name, and the offset of each tensor in that file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, at = {}, 0
    for name, (dtype, shape) in kinds.items():
        size = math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        offsets[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires data to start at a multiple of eight
    return _LENGTH.pack(len(text)) + text, {name: 8 + len(text) + offset for name, offset in offsets.items()}


def read_tensor(tensor: Stored, rows: range | None = None) -> torch.Tensor:
    """Read a tensor as it is stored, or some of its rows, into one buffer of that size."""
    import torch

    if tensor.dtype not in (*FLOAT_TYPES, FP8):
        raise ValueError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, but weights must be one of "
            f"{', '.join(FLOAT_TYPES)}, or {FP8} with scales. Use the original checkpoint"
        )
    begin, size = 0, tensor.size
    shape = tensor.shape
    if rows is not None:
        begin, size = rows.start * tensor.row_size, len(rows) * tensor.row_size
        shape = (len(rows), *tensor.shape[1:])
    raw = torch.empty(size, dtype=torch.uint8)
    with tensor.file.open("rb", buffering=0) as file:
        read_bytes(file.fileno(), tensor, raw.numpy().data, begin)
    return raw.view(torch_type(tensor.dtype)).reshape(shape)


def read_bytes(handle: int, tensor: Stored, buffer: memoryview, begin: int) -> None:
    """Fill a buffer with a tensor's bytes, starting at its byte `begin`, through an open file descriptor."""
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], tensor.begin + begin + done)  # one call reads at most 2 GiB
        if count == 0:
            raise ValueError(f"{tensor.file} ends inside {tensor.name}: it was cut off while it was being read")
        done += count


def numpy_values(raw: bytes, dtype: str) -> Any:
    """Return the values in bytes of a file as a flat float32 array; `dtype` is one of `FLOAT_TYPES`, or fp8."""
    if dtype == FP8:
        return np.take(FP8_VALUES, np.frombuffer(raw, "u1"))
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")  # the upper half of a float32
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype("<f4")


def torch_type(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors type name, one of `FLOAT_TYPES` or fp8."""
    import torch

    kind: torch.dtype = getattr(torch, "float8_e4m3fn" if dtype == FP8 else FLOAT_TYPES[dtype])
    return kind


def type_name(kind: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype; "" if it is none of `FLOAT_TYPES`."""
    return TYPE_NAMES.get(str(kind).removeprefix("torch."), "")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's values as bytes for a file; they are copied if they are not contiguous in host memory."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@dataclass(kw_only=True)
class ReservedFile:
    """A file at its full size that takes its tensors in any order; each byte must be written once.

    Leaving its context flushes it to the disk, unless an error ended it, and closes it.
    """

    file: FileIO
    header: bytes
    tensors: Mapping[str, Stored]
    missing: int
    """Bytes of tensors that are not written yet."""

    def put(self, name: str, tensor: torch.Tensor, begin: int = 0) -> None:
        """Write a tensor, or some of its rows, starting at its byte `begin`."""
        assert tensor.dtype == torch_type(self.tensors[name].dtype), f"{name} has dtype {tensor.dtype}"
        self.put_bytes(name, raw_bytes(tensor), begin)

    def put_bytes(self, name: str, data: memoryview, begin: int = 0) -> None:
        """Write bytes of a tensor, starting at its byte `begin`."""
        tensor = self.tensors[name]
        assert 0 <= begin <= begin + len(data) <= tensor.size, f"{name}: {begin} + {len(data)} of {tensor.size} bytes"
        self._write(data, tensor.begin + begin)
        self.missing -= len(data)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):  # one call writes at most 2 GiB
            done += os.pwrite(self.file.fileno(), view[done:], at + done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.file.closed:
            return
        with self.file:
            if kind is None:
                assert not self.missing, f"{self.missing} bytes of {self.file.name!r} were not written"
                os.fsync(self.file.fileno())


def reserve(path: Path, kinds: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> ReservedFile:
    """Make a file for tensors of (dtype, shape) by name; a disk that is too small fails here, before any tensor."""
    header, begins = _header(kinds, metadata)
    tensors = {
        name: Stored(name=name, file=path, dtype=dtype, shape=shape, begin=begins[name])
        for name, (dtype, shape) in kinds.items()
    }
    size = tensor_bytes(kinds)
    with ExitStack() as stack:
        file = stack.enter_context(path.open("wb", buffering=0))
        os.posix_fallocate(file.fileno(), 0, len(header) + size)
        reserved = ReservedFile(file=file, header=header, tensors=tensors, missing=size)
        reserved._write(header, 0)
        stack.pop_all()
    return reserved

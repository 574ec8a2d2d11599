"""Identifies the base of an adapter or a checkpoint by a hash of values that is equal for every layout and sharding.

The hash covers a few values of each tensor, at places that depend on its name. Another model of the same shape, or one
that was trained further, has other values; a copy in another layout, in other files, or in a wider type has the same.
The values of an fp8 base are its codes times their scales, so it is another base than the one it was made from.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

from finetune.architecture.shapes import Shape, is_expert_stack
from finetune.files.basefiles import BaseFiles
from finetune.files.fp8 import value_at
from finetune.files.layouts import single_expert
from finetune.files.tensorfile import FLOAT_TYPES, ITEM_SIZES, Stored, numpy_values

VALUES = 16
"""Values read from each tensor; this makes about ten thousand small reads for the largest model."""


@lru_cache(maxsize=4)
def fingerprint(files: BaseFiles) -> str:
    """Return the hash, 32 hex digits; read only a few bytes of each tensor.

    The result is cached for an opened base, so a run does not need the base's files to save.
    """
    digest = hashlib.sha256()
    handles: dict[Path, int] = {}
    with ExitStack() as stack:
        for name in sorted(files.shapes):
            shape = files.shapes[name]
            digest.update(repr((name, tuple(shape))).encode())
            for place in _places(name, shape):
                stored, item = _where(files, name, shape, place)
                scale = files.scales.get(stored.name)
                for file in {stored.file, stored.file if scale is None else scale.file} - handles.keys():
                    handles[file] = os.open(file, os.O_RDONLY)
                    stack.callback(os.close, handles[file])
                if scale is None:
                    digest.update(_as_float32(handles[stored.file], stored, item))
                else:
                    digest.update(value_at(stored, scale, item, handles[stored.file], handles[scale.file]))
    return digest.hexdigest()[:32]


def _places(name: str, shape: Shape) -> Iterator[int]:
    """Return the flat indexes of the values, in the orientation of memory."""
    size = math.prod(shape)
    raw = hashlib.shake_256(name.encode()).digest(8 * VALUES)
    return (number % size for number in struct.unpack(f"<{VALUES}Q", raw))


def _where(files: BaseFiles, name: str, shape: Shape, place: int) -> tuple[Stored, int]:
    """Return the stored tensor that contains a value, and the value's flat index in it."""
    if files.layout == "memory" or not is_expert_stack(name):
        return files.stored[name], place
    _, out, into = shape
    expert, rest = divmod(place, out * into)
    row, column = divmod(rest, into)
    if files.layout == "hub":
        return files.stored[name], (expert * into + column) * out + row
    parts = single_expert(name, shape, expert)
    height = parts[0][1][0]
    return files.stored[parts[row // height][0]], row % height * into + column


def _as_float32(handle: int, stored: Stored, item: int) -> bytes:
    size = ITEM_SIZES[stored.dtype]
    raw = os.pread(handle, size, stored.begin + item * size)
    assert len(raw) == size, "the file's length was checked with its header"
    assert stored.dtype in FLOAT_TYPES, "the types were checked with the keys"
    return bytes(numpy_values(raw, stored.dtype).tobytes())

"""Check the tensor files of a checkpoint by size and checksum, and join a tensor from its slices."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.checkpoint.manifest import ANOTHER, File
from finetune.ranks.log import listed

BLOCK = 1 << 22
PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys in a file's metadata under which torch's writer records the place of each slice in its tensor."""


def checked(path: Path) -> File:
    """Return a file's size and checksum; any flipped bit changes it. It takes one core 1 s per 4 GB."""
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return File(bytes=size, crc32=crc)


def require_intact(folder: Path, files: Mapping[str, File], names: Sequence[str]) -> dict[str, File]:
    """Raise unless these files hold the bytes that were written; return their entries."""
    changed = [name for name in names if checked(folder / name) != files[name]]
    if changed:
        raise ValueError(
            f"{folder} is damaged: {listed(changed)}: the checksum differs from the one at the save. {ANOTHER}"
        )
    return {name: files[name] for name in names}


class Tensors:
    """The tensors in a folder's files, by name; the files store slices of the flattened tensors."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._slices: dict[str, list[tuple[int, Any]]] = {}
        for file in files:
            offsets = json.loads(file.metadata()[PLACES])
            for name in file.offset_keys():
                self._slices.setdefault(name, []).append((offsets[name][OFFSETS][0], file))

    def joined(self, name: str) -> Tensor:
        """Join all slices of a tensor, and return it flat."""
        pieces = sorted(self._slices[name], key=lambda piece: piece[0])
        return torch.cat([file.get_tensor(name) for _, file in pieces])


@contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """Open a checkpoint's files; no process group is needed."""
    with ExitStack() as stack:
        yield Tensors([stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))])

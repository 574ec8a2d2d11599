"""A packed row as the forward takes it, with every value that the host needs computed before the row is copied.

A host that reads a value from the device waits until all queued work is done, and queues none meanwhile. So borders,
label places and the tower's arguments are computed on the CPU, where the data loader made the row. All of it is copied
to the device in one transfer from page-locked memory, while the device works on the previous row.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from data.stream.batch import Batch, label_places
from finetune.model.sequence import SequenceGroup, divisible, own_part
from finetune.model.sight import Look, Sight

T = TypeVar("T")
Grouping = Callable[[Batch], Tensor]
"""Numbers the group of each token of a row, in each division of them: int64 [D, T]."""

ALIGN_BYTES = 16
"""Alignment of a tensor in the one buffer that is copied."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The input of one forward on one rank: a divisible row, and the slice of its tokens that belongs to this rank."""

    batch: Batch
    """All tokens of the row, but only the patches that this rank's tower call takes."""
    part: slice
    borders: tuple[int, ...]
    """The row's `cu_seq_lens` as numbers, for an attention that loops over samples on the host."""
    labels_N: Tensor
    """Places in the row of the supervised tokens that this rank's tokens predict, in their order."""
    look: Look | None
    """The call of the tower; None: it is not called."""
    groups_DT: Tensor | None = None
    """The group of each of this rank's tokens, in each division of them; None: no groups are counted."""

    @property
    def valid_T(self) -> Tensor:
        """A mask of this rank's tokens that belong to a sample, in the order in which the routers see them."""
        return self.batch.sample_ids[0, self.part] >= 0

    @property
    def attention(self) -> dict[str, Any]:
        """The keyword arguments by which attention learns the borders of the row's samples."""
        return {**self.batch.attention, "borders": self.borders}


def lay_out(
    batch: Batch, group: SequenceGroup | None = None, sight: Sight | None = None, grouping: Grouping | None = None
) -> Row:
    """Compute on the CPU everything that a row's forward needs; `sight` is None for a model without a tower."""
    batch = divisible(batch, group)
    part = own_part(batch, group)
    groups_DT = grouping(batch)[:, part] if grouping is not None else None
    look = None
    if sight is not None:
        batch, look = sight.look(batch, part, group)
    elif len(batch.image_patches) or len(batch.video_patches):
        raise ValueError(
            f"samples have images or videos, but the model has no vision tower: {', '.join(batch.keys)}. "
            f"Use a vision-language base, or data without media"
        )
    labels_N = label_places(batch)
    predicted = (labels_N > part.start) & (labels_N <= part.stop)  # a label is predicted by the token before it
    return Row(
        batch=batch,
        part=part,
        borders=tuple(batch.cu_seq_lens.tolist()),
        labels_N=labels_N[predicted],
        look=look,
        groups_DT=groups_DT,
    )


class Coming(Generic[T]):
    """An object that contains tensors, on its way to a device since construction; for the CPU nothing is copied."""

    def __init__(self, thing: T, device: torch.device) -> None:
        self._thing, self._device = thing, device
        self._bytes: Tensor | None = None
        if device.type == "cpu":
            return
        tensors = _tensors(thing)
        ends = list(_ends(tensors))
        buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        for tensor, end in zip(tensors, ends, strict=True):
            _view(buffer, end, tensor).copy_(tensor)
        with _beside(device):
            self._bytes = buffer.to(device, non_blocking=True)

    def arrived(self) -> T:
        """Return the object on the device; work queued later on the current stream waits for it, the host does not."""
        if self._bytes is None:
            return self._thing
        buffer, tensors = self._bytes, _tensors(self._thing)
        if self._device.type == "cuda":
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(_side_stream(self._device))
            buffer.record_stream(now)
        views = iter([_view(buffer, end, tensor) for tensor, end in zip(tensors, _ends(tensors), strict=True)])
        there: T = _with_tensors(self._thing, lambda _: next(views))
        return there


def _ends(tensors: list[Tensor]) -> Iterator[int]:
    """Yield where each tensor ends in the buffer, rounded up so that the next one is aligned."""
    end = 0
    for tensor in tensors:
        end += -(-tensor.numel() * tensor.element_size() // ALIGN_BYTES) * ALIGN_BYTES
        yield end


def _view(buffer: Tensor, end: int, like: Tensor) -> Tensor:
    """Return the bytes of the buffer that end at `end`, as a tensor like `like`."""
    size = like.numel() * like.element_size()
    first = end - -(-size // ALIGN_BYTES) * ALIGN_BYTES
    return buffer[first : first + size].view(like.dtype).view(like.shape)


def _tensors(thing: Any) -> list[Tensor]:
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _with_tensors(thing, note)
    return tensors


def _with_tensors(thing: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the same object with each tensor changed, also those inside dataclasses and mappings, in their order."""
    if isinstance(thing, Tensor):
        return change(thing)
    if isinstance(thing, dict):
        return {key: _with_tensors(value, change) for key, value in thing.items()}
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{item.name: _with_tensors(getattr(thing, item.name), change) for item in fields(thing)})
    return thing


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _beside(device: torch.device) -> AbstractContextManager[Any]:
    """Copy on a separate stream, so that the copy need not wait for queued work."""
    return torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext()

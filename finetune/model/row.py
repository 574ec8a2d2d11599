"""A packed row as the forward takes it, with all that the host must know of its values found before it leaves.

A host that asks the device for a value waits until all work queued so far is done, and queues none meanwhile. So
borders, label places, and what the tower works out of grids, are found where the data made the row: on the CPU. All
of it crosses in one copy out of page-locked memory, beside the work of the row before.
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

ALIGN_BYTES = 16
"""Of a tensor in the one buffer that crosses."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one forward of one rank takes: a divisible row, and the part of its tokens that is this rank's."""

    batch: Batch
    """The whole row's tokens, but only those patches that this rank looks at."""
    part: slice
    borders: tuple[int, ...]
    """The row's `cu_seq_lens` again, for an attention that goes from sample to sample on the host."""
    labels_N: Tensor
    """Places in the row of the supervised tokens that this rank's tokens predict, in their order."""
    look: Look | None
    """What the tower is called with; None: it is not called."""

    @property
    def valid_T(self) -> Tensor:
        """Which of this rank's tokens belong to a sample, in the order the routers see them."""
        return self.batch.sample_ids[0, self.part] >= 0

    @property
    def attention(self) -> dict[str, Any]:
        """What attention over the row is told of its samples."""
        return {**self.batch.attention, "borders": self.borders}


def lay_out(batch: Batch, group: SequenceGroup | None = None, sight: Sight | None = None) -> Row:
    """Find on the CPU what a row's forward needs to know; `sight` is None for a model without a tower."""
    batch = divisible(batch, group)
    part = own_part(batch, group)
    look = None
    if sight is not None:
        batch, look = sight.look(batch, part, group)
    elif len(batch.image_patches) or len(batch.video_patches):
        raise ValueError(f"images or videos, but the model has no vision tower: {', '.join(batch.keys)}")
    labels_N = label_places(batch)
    predicted = (labels_N > part.start) & (labels_N <= part.stop)  # a label is predicted by the token before it
    return Row(
        batch=batch, part=part, borders=tuple(batch.cu_seq_lens.tolist()), labels_N=labels_N[predicted], look=look
    )


class Coming(Generic[T]):
    """Something made of tensors, under way to a device since this was made; on the CPU it is there, and not copied."""

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
        """Return it on the device; work queued on the present stream from now on waits for it, the host does not."""
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
    """Where each tensor ends in the buffer, rounded up so that the next one is aligned."""
    end = 0
    for tensor in tensors:
        end += -(-tensor.numel() * tensor.element_size() // ALIGN_BYTES) * ALIGN_BYTES
        yield end


def _view(buffer: Tensor, end: int, like: Tensor) -> Tensor:
    """The bytes of the buffer that end there, as a tensor of this shape."""
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
    """The same, with each tensor changed; dataclasses and mappings are looked into, in their order."""
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
    """Copy on a stream of its own, so that it need not wait for what is queued."""
    return torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext()

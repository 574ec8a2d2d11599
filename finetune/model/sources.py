"""Protocols for the sources of weights that loading reads: a base's files, an adapter's files."""

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor, nn

from finetune.architecture.shapes import Shape
from finetune.model.empty import EmptyModel


class Source(Protocol):
    """Files that hold tensors by canonical name, read by rows."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes in memory of all its tensors."""

    def size(self, name: str, rows: range | None = None) -> int:
        """Return the bytes that reading these rows takes from the disk."""

    def row_bytes(self, name: str) -> int:
        """Return the bytes in memory of one row that was read."""

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return these rows, or the entire tensor."""


class StartValues(Source, Protocol):
    """An adapter to start from: tensors that replace the base's, and low-rank factors."""

    @property
    def factors(self) -> Collection[str]:
        """Names of the low-rank factors."""

    def factor(self, name: str, owner: nn.Module) -> Tensor:
        """Return a factor in the form in which its owner holds it."""

    def check_fits(self, empty: EmptyModel) -> None:
        """Raise ValueError unless each tensor has a place in the model."""

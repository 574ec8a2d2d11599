"""Where weights come from, by what loading asks of it: a base's files, an adapter's."""

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor, nn

from finetune.architecture.shapes import Shape
from finetune.model.empty import EmptyModel


class Source(Protocol):
    """Files that hold tensors by canonical name, read by rows."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Of every tensor it holds, as it lies in memory."""

    def size(self, name: str, rows: range | None = None) -> int:
        """Bytes that reading these rows takes from the disk."""

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return these rows, or all of the tensor."""


class StartValues(Source, Protocol):
    """An adapter to begin with: tensors that replace the base's, and the factors beside them."""

    @property
    def factors(self) -> Collection[str]:
        """Names of the low-rank factors."""

    def factor(self, name: str, owner: nn.Module) -> Tensor:
        """Return a factor as its owner holds it."""

    def check_fits(self, empty: EmptyModel) -> None:
        """Raise unless each tensor has its place in the model."""

"""Access the engine's slices of trainable tensors (views of masters and moments), and put restored ones into use.

ZeRO-3 flattens each tensor and cuts it into equal slices over its group: the world, or for experts the ranks that hold
the same experts. The optimiser keeps one flat tensor per group of tensors, and each slice has a place in it. Only this
file depends on the engine's internals. `cuts` computes the same slices for a model that has no engine yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from finetune.model.empty import EmptyModel
from finetune.ranks.adamw import MOMENTS
from finetune.ranks.collectives import rank_and_world
from moe.experts import GroupedExperts

KINDS = ("master", *MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The cut of one trainable tensor over the ranks, and the part of one rank, in elements."""

    canonical: str
    shape: tuple[int, ...]
    ep: int | None
    """Number of ranks over which the experts are spread before ZeRO cuts them; None: a tensor that all ranks share."""
    pieces: int
    """Number of slices."""
    place: int
    """The index of this rank's slice."""
    padded: int
    """A slice's length, padding included."""
    filled: int
    """Number of real values in this rank's slice; the last slices may be partly or entirely padding."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """This rank's part of one tensor: a view of its elements for each kind, without the padding at the end."""

    canonical: str
    shape: tuple[int, ...]
    ep: int | None
    """The number of slices, as in its cut."""
    views: dict[str, Tensor]
    steps: Tensor

    @property
    def updates(self) -> int:
        """Number of optimiser updates of the tensor."""
        return int(self.steps.item())


def cuts(empty: EmptyModel, rank: int, world: int) -> Iterator[Cut]:
    """Yield the cut of every trainable tensor, in the model's order, including those that a stage pauses."""
    spread = {
        id(parameter): owner.num_experts // len(owner.local_experts)
        for owner in empty.module.modules()
        if isinstance(owner, GroupedExperts)
        for parameter in owner.parameters(recurse=False)
    }
    for name in empty.trained:
        parameter = empty.module.get_parameter(name)
        ep = spread.get(id(parameter))
        first, *rest = shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        pieces, place = world // (ep or 1), rank // (ep or 1)
        total = prod(shape)
        padded = -(-total // pieces)
        yield Cut(
            canonical=empty.canonical(name),
            shape=(first * (ep or 1), *rest),
            ep=ep,
            pieces=pieces,
            place=place,
            padded=padded,
            filled=min(padded, max(0, total - place * padded)),
        )


def slices(engine: Any, empty: EmptyModel) -> list[Slice]:
    """Return this rank's slices of all trainable tensors, in the model's order."""
    return list(_slices(engine.optimizer, empty))


def _slices(zero: Any, empty: EmptyModel) -> Iterator[Slice]:
    for name, cut in zip(empty.trained, cuts(empty, *rank_and_world()), strict=True):
        parameter = empty.module.get_parameter(name)
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        pieces, place = zero._get_param_partition_world_size(parameter), zero._get_param_partition_rank(parameter)
        assert (pieces, place, padded) == (cut.pieces, cut.place, cut.padded), (
            "ZeRO-3 cuts tensors into slices of one size, in order"
        )
        flat = zero.fp32_partitioned_groups_flat[group]
        moments = zero.optimizer.state_of(flat)
        flats = {"master": flat, **{kind: moments[kind] for kind in MOMENTS}}
        yield Slice(
            canonical=cut.canonical,
            shape=cut.shape,
            ep=cut.ep,
            views={kind: values.detach()[offset : offset + cut.filled] for kind, values in flats.items()},
            steps=moments["step"],
        )


def put_in_service(engine: Any) -> None:
    """Copy restored masters into the slices from which weights are gathered; every rank must call this.

    Gathered copies are dropped, because the next forward would see their old values. Persistent copies must be created
    again.
    """
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)

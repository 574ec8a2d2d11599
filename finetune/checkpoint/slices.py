"""The engine's own slices of what trains: views of masters and moments, by canonical name; and back into service.

ZeRO-3 cuts each tensor, flattened, into equal slices over its group: the world, or for experts the ranks that hold the
same experts. The optimiser's memory is one flat tensor per group of tensors, in which a slice has a place. This file
alone knows the engine's inside. `cuts` gives the same for a model that has no engine yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from finetune.model.empty import EmptyModel
from finetune.ranks.collectives import rank_and_world
from moe.experts import GroupedExperts

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one tensor that trains is cut over the ranks, and what one rank has of it, in elements."""

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
    """How much of this rank's slice is the tensor; the last slices are partly or entirely padding."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What this rank keeps of one tensor: a view of its elements by kind, without the padding at the end."""

    canonical: str
    shape: tuple[int, ...]
    ep: int | None
    """As in its cut."""
    views: dict[str, Tensor]
    steps: Tensor

    @property
    def updates(self) -> int:
        """How often the optimiser has updated it."""
        return int(self.steps.item())


def cuts(empty: EmptyModel, rank: int, world: int) -> Iterator[Cut]:
    """Yield the cut of every tensor that trains, in the model's order; also of those that a stage pauses."""
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
    """Return what this rank keeps of every tensor that trains, in the model's order."""
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
        moments = _moments(zero.optimizer, flat)
        flats = {"master": flat, **{kind: moments[kind] for kind in MOMENTS}}
        yield Slice(
            canonical=cut.canonical,
            shape=cut.shape,
            ep=cut.ep,
            views={kind: values.detach()[offset : offset + cut.filled] for kind, values in flats.items()},
            steps=moments["step"],
        )


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """The optimiser's state of one flat tensor; before the first step it is made here as that step would make it."""
    state: dict[str, Tensor] = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
    return state


def put_in_service(engine: Any) -> None:
    """Bring restored masters into the slices that weights are gathered from; every rank must call this.

    Gathered copies are dropped, or the next forward would see the values of before; persistent ones must be made again.
    """
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)

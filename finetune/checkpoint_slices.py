"""The engine's own slices of what trains: views of masters and moments, by canonical name; and back into service.

ZeRO-3 cuts each tensor, flattened, into equal slices over its group: the world, or for experts the ranks that hold the
same experts. The optimiser's memory is one flat tensor per group of tensors, in which a slice has a place. All that is
known here of the engine's inside is in this file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.model import EmptyModel
from moe.experts import GroupedExperts

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What this rank keeps of one tensor: by kind, a view of its elements, without the padding at the end."""

    canonical: str
    shape: tuple[int, ...]
    ep: int | None
    """Over how many ranks the experts are spread before ZeRO cuts them; None: a tensor that all ranks share."""
    views: dict[str, Tensor]
    steps: Tensor

    @property
    def updates(self) -> int:
        """How often the optimiser has moved it."""
        return int(self.steps.item())


def slices(engine: Any, empty: EmptyModel) -> list[Slice]:
    """Return what this rank keeps of every tensor that trains, in the model's order."""
    return list(_slices(engine.optimizer, empty))


def _slices(zero: Any, empty: EmptyModel) -> Iterator[Slice]:
    spread = {
        id(parameter): owner.num_experts // len(owner.local_experts)
        for owner in empty.module.modules() if isinstance(owner, GroupedExperts)
        for parameter in owner.parameters(recurse=False)
    }  # fmt: skip
    for name in empty.trained:  # also what a stage pauses
        parameter = empty.module.get_parameter(name)
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        moments = _moments(zero.optimizer, flat)
        held = _elements(zero, parameter, padded)
        flats = {"master": flat, **{kind: moments[kind] for kind in MOMENTS}}
        ep = spread.get(id(parameter))
        first, *rest = parameter.ds_shape  # type: ignore[attr-defined]  # the engine's
        yield Slice(
            canonical=empty.canonical(name),
            shape=(first * (ep or 1), *rest),
            ep=ep,
            views={kind: whole.detach()[offset : offset + held] for kind, whole in flats.items()},
            steps=moments["step"],
        )


def _elements(zero: Any, parameter: Any, padded: int) -> int:
    """How many of a slice's places hold elements of the tensor; in the last slices some or all are padding."""
    pieces: int = zero._get_param_partition_world_size(parameter)
    rank: int = zero._get_param_partition_rank(parameter)
    total: int = parameter.ds_numel
    assert padded == -(-total // pieces), "ZeRO-3 cuts a tensor into slices of one size, the last ones padded"
    return min(padded, max(0, total - rank * padded))


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """The optimiser's state of one flat tensor; before its first step it is made, as that step would."""
    state: dict[str, Tensor] = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
    return state


def put_in_service(engine: Any) -> None:
    """Bring restored masters into the weights that the forward reads; every rank must call this.

    Small parameters are kept gathered from one step to the next: their copies are dropped and gathered again, or the
    next forward would still see the values of before.
    """
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    zero.checkpoint_event_epilogue()

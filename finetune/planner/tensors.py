"""The tensors that a configuration trains, as one rank holds them whole: arithmetic over shapes. Loads no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from finetune.architecture.families import Family
from finetune.architecture.parts import FAMILIES
from finetune.architecture.shapes import Shape, is_expert_stack, parameter_shapes, part_of
from finetune.config import AdaptersConfig


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One parameter that the engine partitions: over all ranks, or over those that hold the same experts."""

    part: str
    elements: int
    expert: bool
    trained: bool


@cache
def trained_tensors(base: Family, adapters: AdaptersConfig, *, ep: int) -> tuple[Tensor, ...]:
    """What trains on a rank of an expert-parallel group of `ep`; an expert's tensors are this rank's experts'."""
    modes = {part: getattr(adapters, family) for family, part in FAMILIES.items()}
    found: list[Tensor] = []
    for name, shape in parameter_shapes(base).items():
        part, family = part_of(name), modes[part_of(name)]
        if family.mode == "full":
            elements = prod(shape) // (ep if is_expert_stack(name) else 1)
            found.append(Tensor(part=part, elements=elements, expert=is_expert_stack(name), trained=True))
        elif family.mode == "lora":
            found += [
                Tensor(part=part, elements=elements, expert=is_expert_stack(name), trained=True)
                for elements in _factors(name, shape, family, ep)
            ]
    return tuple(found)


@cache
def frozen_tensors(base: Family, adapters: AdaptersConfig, *, ep: int) -> tuple[Tensor, ...]:
    """What stays as it is, as one rank would hold it whole."""
    modes = {part: getattr(adapters, family).mode for family, part in FAMILIES.items()}
    return tuple(
        Tensor(
            part=part_of(name),
            elements=prod(shape) // (ep if is_expert_stack(name) else 1),
            expert=is_expert_stack(name),
            trained=False,
        )
        for name, shape in parameter_shapes(base).items()
        if modes[part_of(name)] != "full"
    )


def _factors(name: str, shape: Shape, family: Any, ep: int) -> Iterator[int]:
    """Elements of a matrix's two factors; a stack's of every expert that the rank has."""
    if is_expert_stack(name):
        local, out, into = shape[0] // ep, shape[1], shape[2]
        yield from (local * family.r * into, local * out * family.r)
    elif len(shape) == 2 and name.endswith(".weight"):
        yield from (family.r * shape[1], shape[0] * family.r)

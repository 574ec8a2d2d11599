"""The tensors that a configuration trains, as one rank holds them whole: arithmetic over shapes. Loads no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

from finetune.architecture.families import Family
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
    """Return what trains on a rank of an expert-parallel group of `ep`; of the experts, only those of this rank."""
    tensors: list[Tensor] = []
    for name, shape in parameter_shapes(base).items():
        part = part_of(name)
        section = getattr(adapters, part)
        if section.mode == "full":
            elements = prod(shape) // (ep if is_expert_stack(name) else 1)
            tensors.append(Tensor(part=part, elements=elements, expert=is_expert_stack(name), trained=True))
        elif section.mode == "lora":
            tensors += [
                Tensor(part=part, elements=elements, expert=is_expert_stack(name), trained=True)
                for elements in _factors(name, shape, section.r, ep)
            ]
    return tuple(tensors)


@cache
def frozen_tensors(base: Family, adapters: AdaptersConfig, *, ep: int) -> tuple[Tensor, ...]:
    """Return what does not change, as one rank would hold it whole."""
    return tuple(
        Tensor(
            part=part_of(name),
            elements=prod(shape) // (ep if is_expert_stack(name) else 1),
            expert=is_expert_stack(name),
            trained=False,
        )
        for name, shape in parameter_shapes(base).items()
        if getattr(adapters, part_of(name)).mode != "full"
    )


def _factors(name: str, shape: Shape, r: int, ep: int) -> Iterator[int]:
    """Yield the elements of a matrix's two factors; of a stack, those of all the experts on one rank."""
    if is_expert_stack(name):
        experts, out, into = shape
        yield from (experts // ep * r * into, experts // ep * out * r)
    elif len(shape) == 2 and name.endswith(".weight"):
        out, into = shape
        yield from (r * into, out * r)

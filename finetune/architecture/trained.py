"""The tensors that a configuration trains, as one rank holds them whole: arithmetic over shapes. Loads no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

from finetune.architecture.families import Family
from finetune.architecture.parts import QUANTISED_DENSE
from finetune.architecture.shapes import Shape, is_expert_stack, parameter_shapes, part_of
from finetune.config import AS_THEY_ARE, AdaptersConfig, QuantiseConfig
from moe.kernels.packed import Packing


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One parameter that the engine partitions: over all ranks, or over those that hold the same experts."""

    part: str
    elements: int
    """A quantised tensor has bytes as elements, for the engine too."""
    expert: bool
    trained: bool
    packed: bool = False
    """Whether it is quantised, so that each element is one byte."""


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
def frozen_tensors(
    base: Family, adapters: AdaptersConfig, *, ep: int, quantise: QuantiseConfig = AS_THEY_ARE
) -> tuple[Tensor, ...]:
    """Return what does not change, as one rank would hold it whole."""
    tensors: list[Tensor] = []
    for name, shape in parameter_shapes(base).items():
        if getattr(adapters, part_of(name)).mode == "full":
            continue
        is_stack, packing = is_expert_stack(name), packing_of(name, shape, quantise)
        matrices = shape[0] // ep if is_stack else 1
        size = prod(shape[-2:] if is_stack else shape) if packing is None else packing.row_bytes
        tensors.append(
            Tensor(
                part=part_of(name),
                elements=matrices * size,
                expert=is_stack,
                trained=False,
                packed=packing is not None,
            )
        )
    return tuple(tensors)


def packing_of(name: str, shape: Shape, quantise: QuantiseConfig) -> Packing | None:
    """Return how `model.quantise` packs the matrices of a frozen tensor; None if it leaves them as they are."""
    is_linear = len(shape) == 2 and name.endswith(".weight") and part_of(name) in QUANTISED_DENSE
    bits = quantise.experts if is_expert_stack(name) else quantise.dense if is_linear else "none"
    return None if bits == "none" else Packing(bits=bits, out=shape[-2], into=shape[-1])


def _factors(name: str, shape: Shape, r: int, ep: int) -> Iterator[int]:
    """Yield the elements of a matrix's two factors; of a stack, those of all the experts on one rank."""
    if is_expert_stack(name):
        experts, out, into = shape
        yield from (experts // ep * r * into, experts // ep * out * r)
    elif len(shape) == 2 and name.endswith(".weight"):
        out, into = shape
        yield from (r * into, out * r)

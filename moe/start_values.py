"""Start values of LoRA factors, drawn from a seed and a name, so that they are equal on every rank of every layout."""

import hashlib
import math

import torch
from torch import Generator, Tensor


def generator_of(seed: int, name: str) -> Generator:
    """Return a random generator that depends only on the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def uniform_factor(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Return a float32 A [r, in], uniform in +-1/sqrt(in), as in PEFT."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)

"""`quant-memory`: bits of a frozen weight in each form, counted, compared with bfloat16 and with bitsandbytes."""

from collections.abc import Iterator
from importlib.util import find_spec
from math import prod

import torch

from benchmarks.harness.figure import Figure, Peer, Target, at_most
from finetune.architecture.families import family
from finetune.architecture.shapes import is_expert_stack, parameter_shapes
from finetune.architecture.trained import frozen_tensors
from finetune.config import QuantiseConfig, RunConfig
from moe.kernels.packed import Bits, Packing

MODELS = ("qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b")
MOST: dict[Bits, float] = {"int8": 8.1, "nf4": 4.2}
DENSE = (4096, 2048)
"""A query projection of 30B."""


def run() -> Iterator[Figure]:
    """Yield the bits of a weight of each model's experts, then those of one dense matrix, counted from real tensors."""
    for name in MODELS:
        base = family(name)
        weights = sum(prod(shape) for key, shape in parameter_shapes(base).items() if is_expert_stack(key))
        for bits, most in MOST.items():
            tensors = frozen_tensors(base, RunConfig().adapters, ep=1, quantise=QuantiseConfig(experts=bits))
            held = sum(tensor.elements for tensor in tensors if tensor.packed)
            yield _figure(f"bits of an expert's weight, {name}, {bits}", 8 * held / weights, at_most(most))
    matrix = torch.randn(DENSE, generator=torch.Generator().manual_seed(0)).bfloat16()
    for bits, most in MOST.items():
        packed = Packing(bits=bits, out=DENSE[0], into=DENSE[1]).pack(matrix[None], name="matrix")
        peer = _bitsandbytes(matrix, bits)
        yield _figure(f"bits of a dense weight, {bits}", 8 * packed.nbytes / matrix.numel(), at_most(most), peer)


def _figure(metric: str, bits: float, target: Target, peer: Peer | None = None) -> Figure:
    return Figure(metric, bits, "bits", config={}, n=1, peer=peer or Peer("bfloat16", 16.0), target=target)


def _bitsandbytes(matrix: torch.Tensor, bits: Bits) -> Peer | None:
    """Return the bits that bitsandbytes holds for the same matrix, if it is installed."""
    if find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes.functional as bnb

    if bits == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
        held = codes.nbytes + scales.nbytes
    else:
        packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
        held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    return Peer("bitsandbytes", 8 * held / matrix.numel())

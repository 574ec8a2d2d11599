"""Frozen matrices in int8 and nf4: codes and scales as bitsandbytes makes them, and small errors."""

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from finetune.architecture.families import family
from finetune.architecture.shapes import is_expert_stack, parameter_shapes
from moe.kernels import nf4
from moe.kernels.packed import Bits, Packing

SHAPES = [(96, 128), (80, 48), (24, 20), (1536, 2048)]
"""64 divides the rows of the first and the last; the last has more scales than two blocks of the second level hold."""


def matrix(shape: tuple[int, int], *, rounded: bool = False) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    made[3] = 0  # a row of zeros, and with it a block of zeros where 64 divides the row
    return made.bfloat16().float() if rounded else made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rounded", [False, True])
def test_nf4_equals_bitsandbytes(shape: tuple[int, int], rounded: bool) -> None:
    weight = matrix(shape, rounded=rounded)
    theirs = oracle.ask(oracle.quantised, weight=weight.numpy(), bits="nf4")
    ours = dict(zip(("codes", "scale codes", "scales", "offset"), nf4.quantise(weight), strict=True))
    for name, values in ours.items():
        assert np.array_equal(values.numpy(), theirs[name]), name
    if shape[1] % 64:  # bitsandbytes 0.50.2 reads wrong scales there with AVX-512
        return
    packing = Packing(bits="nf4", out=shape[0], into=shape[1])
    packed = packing.pack(weight[None], name="w")
    assert np.array_equal(packing.unpack(packed, torch.empty(1, *shape))[0].numpy(), theirs["values"])
    narrow = packing.unpack(packed, torch.empty((1, *shape), dtype=torch.bfloat16))[0]
    apart = np.abs(narrow.view(torch.int16).numpy().astype(int) - theirs["bfloat16"])
    assert apart.max() <= 1, "one unit in the last place of bfloat16"


def test_codes_of_scales_equal_bitsandbytes_on_its_grid() -> None:
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    values[::256] = 1.0
    values[1::2] *= 1e-4
    theirs = oracle.ask(oracle.quantised, weight=values.numpy(), bits="scales")
    codes, scales = nf4.quantise_scales(values)
    assert np.array_equal(codes.numpy(), theirs["codes"])
    assert np.array_equal(scales.numpy(), theirs["scales"])
    assert np.array_equal(nf4.scale_table(values.device).numpy(), theirs["table"])


def test_int8_equals_bitsandbytes() -> None:
    weight = matrix((80, 48)).half().float()  # bitsandbytes takes float16 only
    theirs = oracle.ask(oracle.quantised, weight=weight.numpy(), bits="int8")
    packing = Packing(bits="int8", out=80, into=48)
    values = packing.unpack(packing.pack(weight[None], name="w"), torch.empty(1, 80, 48))[0]
    assert np.array_equal(values.numpy(), theirs["codes"] * theirs["scales"][:, None])
    assert (values - weight).abs().max() <= theirs["scales"].max() / 2 * (1 + 1e-5)


@pytest.mark.parametrize(("bits", "error"), [("int8", 0.01), ("nf4", 0.1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_stay_close_and_rows_may_be_spaced(bits: Bits, error: float, shape: tuple[int, int]) -> None:
    """Experts unpack into rows with room for LoRA; each matrix is packed by itself, whatever stands beside it."""
    packing = Packing(bits=bits, out=shape[0], into=shape[1])
    weights = torch.stack([matrix(shape), 3 * matrix(shape).flip(1)])
    packed = packing.pack(weights, name="w")
    assert torch.equal(packed[1:], packing.pack(weights[1:], name="w"))
    assert packed.shape == (2, packing.row_bytes)
    room = torch.full((2, shape[0] + 4, shape[1] + 8), 7.0)
    values = packing.unpack(packed, room[:, : shape[0], : shape[1]])
    assert (values - weights).norm() < error * weights.norm()
    assert (room[:, shape[0] :] == 7).all()
    assert (room[:, :, shape[1] :] == 7).all()


@pytest.mark.parametrize(("bits", "most"), [("int8", 8.1), ("nf4", 4.2)])
def test_bits_per_weight_at_published_sizes(bits: Bits, most: float) -> None:
    for name in ("qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b"):
        stacks = [shape for key, shape in parameter_shapes(family(name)).items() if is_expert_stack(key)]
        for out, into in {shape[1:] for shape in stacks}:
            assert Packing(bits=bits, out=out, into=into).bits_per_weight <= most
    assert Packing(bits="nf4", out=1536, into=2048).bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), 1e-4)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_value_that_is_not_finite_is_refused(bits: Bits) -> None:
    weight = matrix((24, 20))
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layers.0.up holds a value that is not finite.*Fetch the file again"):
        Packing(bits=bits, out=24, into=20).pack(weight[None], name="layers.0.up")

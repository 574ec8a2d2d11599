"""Matrices in int8: symmetric, with one float32 scale for each output row."""

import torch
from torch import Tensor

LARGEST = 127


def quantise(matrix_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 codes [out, in] and the scales [out] of a float32 matrix; a row of zeros has the scale 0."""
    largest_O = matrix_OI.abs().amax(1)
    codes_OI = (matrix_OI * (LARGEST / largest_O)[:, None]).nan_to_num_(0.0).round_().to(torch.int8)
    return codes_OI, largest_O / LARGEST


def dequantise(codes: Tensor, scales: Tensor, into: Tensor) -> None:
    """Fill one matrix [out, in] with code x scale, in float32 with one rounding to its type."""
    torch.mul(codes, scales[:, None], out=into)

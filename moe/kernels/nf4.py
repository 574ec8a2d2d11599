"""Matrices in nf4: 4-bit codes in blocks of 64 weights, and the largest weight of each block as an 8-bit code.

The codes are the quantiles of a normal distribution (Dettmers et al., 2023). A block is scaled by its largest absolute
weight. These scales, less their mean (the offset), are quantised too: in blocks of 256, to the codes of SCALES
("double quantisation"). Codes, scale codes and offsets equal those that bitsandbytes computes on a CPU from float32.

Blocks run over the flattened matrix; if 64 divides `in`, each lies in one row. The last one may be shorter.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.packed import BLOCK, SCALE_BLOCK

CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_LAST = 65535
"""The last point of the grid on which scale codes are looked up."""
_LEAST = 1e-38
"""Scales below this count as this, so that a block of zeros divides by no zero."""


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the packed codes, scale codes, scales of the scale codes, and offset [1] of one float32 matrix.

    Two codes share a byte, the first in its upper half; the matrix must have an even number of elements.
    """
    flat = matrix.flatten()
    blocks = _blocks(flat, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / largest.clamp(min=_LEAST))[:, None]).clamp_(-1.0, 1.0)
    codes = torch.bucketize(scaled.flatten()[: len(flat)], _borders(flat.device), out_int32=True).to(torch.uint8)
    # the mean is computed on the CPU: a GPU adds in another order, and every device must find the same bytes
    offset = largest.cpu().mean().to(flat.device)
    scale_codes, scales = quantise_scales(largest - offset)
    return codes[::2] << 4 | codes[1::2], scale_codes, scales, offset[None]


def quantise_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit codes of float32 values, and the scale of each block of 256.

    As in bitsandbytes, a scaled value is first rounded to a grid of 65,536 points, of which each has its nearest code.
    """
    blocks = _blocks(values, SCALE_BLOCK)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / largest.clamp(min=_LEAST))[:, None]).clamp_(-1.0, 1.0).flatten()[: len(values)]
    return _nearest(values.device)[(((scaled + 1) * 0.5) * _LAST + 0.5).int()], largest


def block_scales(scale_codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """Return the float32 scale of each block of weights [..., blocks]."""
    each = scales.repeat_interleave(SCALE_BLOCK, -1)[..., : scale_codes.shape[-1]]
    return scale_table(scale_codes.device)[scale_codes.int()] * each + offset


def dequantise(codes: Tensor, scales: Tensor, into: Tensor) -> None:
    """Fill one matrix [out, in] from packed codes: code x scale of its block, in float32 with one rounding."""
    pairs = F.embedding(codes.int(), _pairs(codes.device))
    if into.shape[1] % BLOCK == 0:
        shape = (into.shape[0], into.shape[1] // BLOCK)
        torch.mul(pairs.view(*shape, BLOCK), scales.view(*shape, 1), out=into.view(*shape, BLOCK))
    else:
        blocks = _blocks(pairs.flatten(), BLOCK) * scales[:, None]
        into.copy_(blocks.flatten()[: into.numel()].view_as(into))


def _blocks(flat: Tensor, size: int) -> Tensor:
    """Return a vector in rows of `size`, the last filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


@cache
def code_table(device: torch.device) -> Tensor:
    """Return the 16 values of codes, in order."""
    return torch.tensor(CODES, device=device)


@cache
def _borders(device: torch.device) -> Tensor:
    codes = code_table(device)
    return (codes[:-1] + codes[1:]) / 2


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two values of each byte."""
    codes = torch.tensor(CODES)
    return torch.cartesian_prod(codes, codes).to(device)


@cache
def _nearest(device: torch.device) -> Tensor:
    """Return the nearest scale code of each point of the grid, from -1 to 1; of two as near, the lower one."""
    table, grid = scale_table(device), torch.arange(_LAST + 1, device=device) / _LAST * 2 - 1
    above = torch.searchsorted(table, grid).clamp_(1, len(table) - 1)
    is_above = table[above] - grid < grid - table[above - 1]
    return (above - 1 + is_above).to(torch.uint8)


@cache
def scale_table(device: torch.device) -> Tensor:
    """Return the 256 values of scale codes, in order: seven decades with ever more values, 0 and 1.

    Decade i, down from 1, has the centres of 2^(6-i) equal parts of its span from a tenth of its top to its top, with
    both signs.
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        decade = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*decade, *(-value for value in decade)]
    return torch.tensor(sorted(values), device=device)

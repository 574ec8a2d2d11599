"""Time the patch embedding as a linear product, compared with transformers' Conv3d, whose kernel equals its stride."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.device import cudnn_version, synchronise
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure
from benchmarks.harness.measure import Side, race
from benchmarks.harness.outputs import same_tensors

KERNEL = (2, 16, 16)
RELATIVE = 2e-2


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield the time of one forward over all patches of a row."""
    torch.manual_seed(0)
    width = sizes.model.vision_hidden
    convolution = nn.Conv3d(3, width, KERNEL, stride=KERNEL).to(sizes.device, torch.bfloat16)
    rows = torch.randn(sizes.patches, 3 * 2 * 16 * 16).to(sizes.device, torch.bfloat16)
    with torch.no_grad():
        raced = race(
            Side(name="linear", run=lambda: {"y": F.linear(rows, convolution.weight.flatten(1), convolution.bias)}),
            Side(name="Conv3d", run=lambda: {"y": convolution(rows.view(-1, 3, *KERNEL)).view(-1, width)}),
            same=_same,
            rounds=sizes.rounds,
            warmup=0,  # Conv3d may take seconds
            synchronise=synchronise,
        )
    config = {"patches": sizes.patches, "width": width, "dtype": "bfloat16", "cudnn": cudnn_version()}
    yield raced.figure(f"patch embedding of {sizes.patches} patches", config=config)


def _same(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    same_tensors(ours, peer, relative=RELATIVE)

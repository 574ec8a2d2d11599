"""Host memory for waiting tensors: few blocks, exact values, and reuse of memory."""

import gc

import torch

from moe.host import HostMemory

KIB = 1024


def _blocks(*copies) -> int:
    return len({copy.values.untyped_storage().data_ptr() for copy in copies})


def test_copies_share_blocks_and_keep_their_values_shapes_and_types() -> None:
    memory = HostMemory(block_bytes=64 * KIB)
    tensors = [
        torch.randn(100, 30),
        torch.randn(41, 7, dtype=torch.bfloat16),
        torch.randn(60, 50).t(),
        torch.randn(3, 5, requires_grad=True),
        torch.empty(0, 8),
    ]
    copies = [memory.copy(tensor) for tensor in tensors]
    assert _blocks(*copies[:4]) == 1
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy.back(), tensor)
        assert (copy.values.dtype, copy.values.shape) == (tensor.dtype, tensor.shape)
        assert copy.back().data_ptr() != copy.values.data_ptr() or not tensor.numel()


def test_a_block_is_reused_when_none_of_its_copies_is_alive() -> None:
    memory = HostMemory(block_bytes=10 * KIB)
    ones = torch.ones(KIB)  # 4 KiB: two fit in a block
    first, second, third = (memory.copy(ones * n) for n in (1, 2, 3))
    assert _blocks(first, second) == 1
    assert _blocks(first, third) == 2
    place = first.values.data_ptr()
    del first
    gc.collect()
    fourth = memory.copy(ones * 4)
    assert _blocks(third, fourth) == 1, "the second copy still uses the first block"
    del second
    gc.collect()
    fifth = memory.copy(ones * 5)
    assert fifth.values.data_ptr() == place
    assert [copy.values[0].item() for copy in (third, fourth, fifth)] == [3, 4, 5]


def test_a_tensor_larger_than_a_block_has_a_block_of_its_own() -> None:
    memory = HostMemory(block_bytes=4 * KIB)
    large = memory.copy(torch.arange(5000.0))
    small = memory.copy(torch.ones(8))
    assert _blocks(large, small) == 2
    assert large.values.untyped_storage().nbytes() == 20_000
    assert torch.equal(large.back(), torch.arange(5000.0))

"""Memory of grouped experts: kept, allocated and recomputed tensors, and the room for the adapter in frozen weights."""

import copy
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from expert_cases import (
    CHUNKED,
    COUNTS,
    F_,
    FACTORS,
    KINDS,
    R_LORA,
    ROW_BYTES,
    Checkpointed,
    D,
    L,
    made,
    rows_for,
    run,
    same,
    wanted,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moe import projections, recompute
from moe.experts import GroupedExperts

# ---- tensors kept, allocated and computed again


class Allocations(TorchDispatchMode):
    """Measures new storages in bytes: the largest one, and the most that are alive at a time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.alive: dict[int, tuple[int, list[weakref.ref[Tensor]]]] = {}
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = self.peak = 0
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.calls.append((func.name(), tuple(tensor.shape)))
                self.note(tensor)
        return out

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.known:
            return
        alive = {ptr: entry for ptr, entry in self.alive.items() if any(ref() is not None for ref in entry[1])}
        size, refs = alive.get(storage.data_ptr(), (storage.nbytes(), []))
        alive[storage.data_ptr()] = (size, [*refs, weakref.ref(tensor)])
        self.alive = alive
        self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for size, _ in alive.values()))


def kept_bytes(module: GroupedExperts, x: Tensor, counts: Tensor) -> int:
    """Return the bytes that the graph keeps alive, except weights."""
    weights = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, counts)
    return sum(seen.values())


def test_the_graph_keeps_no_more_than_it_needs() -> None:
    rows, offs = sum(COUNTS["mixed"]), 4 * L
    for (mode, resident), numbers in {
        ("frozen", True): 2 * F_,
        ("frozen", False): 2 * F_,
        ("lora", True): D + 2 * F_ + 2 * R_LORA,
        ("lora", False): D + 2 * F_ + 2 * R_LORA,
        ("full", False): D + 2 * F_,
    }.items():
        module = made(mode, resident)
        x, counts, _ = rows_for(module, COUNTS["mixed"])
        assert kept_bytes(module, x, counts) == 4 * rows * numbers + offs
        chunked = made(mode, resident, **CHUNKED["in chunks"])
        assert kept_bytes(chunked, x, counts) == 4 * rows * numbers + offs
        again = made(mode, resident, **CHUNKED["in chunks, again in backward"])
        assert kept_bytes(again, x, counts) == 4 * rows * D + offs


@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_memory_of_skewed_routing_is_bounded(mode: str, resident: bool) -> None:
    peaks = []
    for rows in (256, 2048):
        module = made(mode, resident, chunk_bytes=64 * ROW_BYTES, keep_bytes=100 * 2 * F_ * 4)
        assert module.chunk_rows == 64
        x, counts, grad = rows_for(module, [0, 0, rows, 0, 0])
        with Allocations(x, grad, *module.parameters(), *module.buffers()) as seen:
            y = module(x, counts)
            seen.alive.pop(y.untyped_storage().data_ptr())
            forward = seen.peak - 4 * rows * D
            seen.peak = 0
            y.backward(grad)
        peaks.append((forward, seen.peak - 4 * rows * D))  # beyond y, and beyond the gradient of x
    assert peaks[0] == peaks[1]
    assert max(peaks[0]) > 0


def test_intermediates_of_chunks_do_not_grow_with_rows() -> None:
    peaks = []
    for rows in (256, 2048):
        module = made(chunk_bytes=64 * ROW_BYTES)
        x, counts, grad = rows_for(module, [0, 0, rows, 0, 0])
        with Allocations(x, grad, *module.parameters(), *module.buffers()) as seen:
            module(x, counts)
        peaks.append(seen.peak - 4 * rows * (D + 2 * F_ + 2 * R_LORA))  # beyond y and what backward needs
    assert peaks[0] == peaks[1] > 0


def test_gradients_of_experts_without_rows_are_zero_whatever_the_kernel_wrote() -> None:
    grad = projections.clear_empty(torch.full((4, 3, 2), float("nan")), torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert grad.isnan().flatten(1).all(1).tolist() == [False, True, False, True]
    assert not grad[::2].any()


def test_no_allocation_is_as_large_as_an_expert_stack() -> None:
    module = made(hidden=64, intermediate=32)
    x, counts, grad = rows_for(module, [1, 2, 1, 3, 1])
    with Allocations(x, grad, *module.parameters(), *module.buffers()) as seen:
        run(module, x, counts, grad)
    assert 0 < seen.largest < module.down.numel() * 4
    assert sum("grouped_mm" in name for name, _ in seen.calls) == 12


def keep_wide(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    wide = "grouped_mm" in op.name() and min(args[1].shape[1:]) > R_LORA
    return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("chunks", CHUNKED.values(), ids=CHUNKED.keys())
@pytest.mark.parametrize(("mode", "resident"), KINDS)
@pytest.mark.parametrize("contexts", ["layer", "selective", "torch"])
def test_recompute_changes_nothing(contexts: str, mode: str, resident: bool, chunks: dict[str, int]) -> None:
    module = made(mode, resident, **chunks)
    policy = partial(create_selective_checkpoint_contexts, keep_wide)
    wrapped = Checkpointed(module, policy if contexts == "torch" else recompute.contexts(contexts))
    arguments = rows_for(module, COUNTS["gaps"])
    expected = run(module, *arguments)
    found = {name.removeprefix("inner."): value for name, value in run(wrapped, *arguments).items()}
    same(found, expected, 1e-6)


def test_selective_recompute_repeats_no_wide_gemm() -> None:
    module = made()
    x, counts, grad = rows_for(module, COUNTS["mixed"])
    widths = {}
    for mode in ("none", "layer", "selective"):
        wrapped = module if mode == "none" else Checkpointed(module, recompute.contexts(mode))
        y = wrapped(x, counts)
        with Allocations() as seen:
            y.backward(grad)
        shapes = [shape for name, shape in seen.calls if "grouped_mm" in name and shape[0] == x.shape[0]]
        widths[mode] = sum(shape[1] > R_LORA for shape in shapes)
    # backward itself has three: two frozen GEMMs and A of down; the second pass of selective adds B of gate_up
    assert widths == {"none": 3, "layer": 3 + 3, "selective": 3 + 1}


# ---- room for the adapter in the frozen weights


def test_weights_may_be_moved_copied_or_replaced() -> None:
    module = made()
    x, counts, grad = rows_for(module, COUNTS["mixed"])
    expected = run(module, x, counts, grad)
    weights = {key: getattr(module, key).clone() for key in ("gate_up", "down")}
    larger = {"gate_up": torch.full((L, 2 * F_ + R_LORA, D), 7.0), "down": torch.full((L, D, F_ + R_LORA), 7.0)}

    copied = copy.deepcopy(module)
    cast = copy.deepcopy(module).double().float()
    assigned = copy.deepcopy(module)
    assigned.load_state_dict(module.state_dict(), assign=True)
    sliced = copy.deepcopy(module)
    for key, dim in (("gate_up", 1), ("down", 2)):
        view = larger[key].narrow(dim, 0, weights[key].shape[dim])
        view.copy_(weights[key])
        setattr(sliced, key, view)
    for other in (copied, cast, assigned, sliced):
        same(run(other, x, counts, grad), expected, 0)
        for key, weight in weights.items():
            assert torch.equal(getattr(other, key), weight)
    assert (larger["gate_up"][:, 2 * F_ :] == 7).all(), "memory of another tensor was overwritten"
    assert (larger["down"][:, :, F_:] == 7).all()


def test_the_next_call_uses_a_changed_adapter() -> None:
    module = made()
    x, counts, grad = rows_for(module, COUNTS["mixed"])
    before = run(module, x, counts, grad)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-1.5)
    found = run(module, x, counts, grad)
    assert (found["y"] - before["y"]).abs().max() > 0.01
    same(found, wanted(module, x, COUNTS["mixed"], grad))


@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_experts_may_be_built_on_meta_and_filled_later(mode: str, resident: bool) -> None:
    direct = made(mode, resident)
    late = made(mode, resident, device="meta")
    assert all(t.is_meta for t in [*late.parameters(), *late.buffers()])
    late.to_empty(device="cpu")
    for key in ("gate_up", "down"):  # as a loader does: a new tensor instead of the one on meta
        filled = getattr(direct, key).detach().clone(memory_format=torch.contiguous_format)
        setattr(late, key, filled if resident else nn.Parameter(filled, requires_grad=mode == "full"))
        late.make_room()
    late.init_lora(b_std=0.3)
    settled = dict(late.named_buffers())
    arguments = rows_for(direct, COUNTS["gaps"])
    same(run(late, *arguments), run(direct, *arguments), 0)
    assert all(getattr(late, name) is buffer for name, buffer in settled.items()), "forward made room again"
    names = {"gate_up", "down"} | (set(FACTORS) if mode == "lora" else set())
    assert set(late.state_dict()) == names
    frozen = {name for name, _ in late.named_buffers()}
    assert frozen == ({"gate_up", "down"} if resident else set())
    assert {name for name, p in late.named_parameters() if p.requires_grad} == {
        "lora": set(FACTORS),
        "full": {"gate_up", "down"},
        "frozen": set(),
    }[mode]

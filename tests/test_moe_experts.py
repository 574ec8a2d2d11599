"""Grouped experts against the reference and against PEFT; what they keep, and what they refuse."""

import copy
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_moe import vl_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe import packing, recompute, reference
from moe.experts import ExpertLora, GroupedExperts, initial_lora

D, F_, L, R_LORA = 24, 20, 5, 4
FACTORS = ["gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B"]
COUNTS = {
    "mixed": [7, 1, 12, 3, 9],
    "gaps": [0, 9, 0, 14, 0],
    "one takes all": [0, 0, 33, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}
KINDS = [("frozen", True), ("frozen", False), ("lora", True), ("lora", False), ("full", False)]


def made(
    mode: str = "lora", resident: bool = True, *, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any
) -> GroupedExperts:
    """Experts 2..6 of 8 with weights of a size that makes every part matter."""
    lora = ExpertLora(r=R_LORA if dtype == torch.float32 else 8, alpha=6.0) if mode == "lora" else None
    sizes: dict[str, Any] = dict(num_experts=8, local_experts=range(2, 2 + L), hidden=D, intermediate=F_)
    if dtype == torch.bfloat16:
        sizes |= dict(hidden=32, intermediate=24)
    module = GroupedExperts(
        **{
            **dict(name="layers.0.mlp.experts", mode=mode, lora=lora, resident=resident, seed=seed, dtype=dtype),
            **sizes,
            **options,
        }
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key in ("gate_up", "down"):
            weight = getattr(module, key)
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    module.init_lora(b_std=0.3)
    return module


def rows_for(module: GroupedExperts, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Input rows, their counts, and a gradient for the output."""
    generator = torch.Generator().manual_seed(sum(counts))
    shape, dtype, device = (sum(counts), module.hidden), module.gate_up.dtype, module.gate_up.device
    x, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), torch.tensor(counts, device=device), grad


def run(module: nn.Module, x: Tensor, counts: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and every gradient, by name."""
    module.zero_grad()
    x.grad = None
    y = module(x, counts)
    y.backward(grad)
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


def wanted(module: GroupedExperts, x: Tensor, counts: list[int], grad: Tensor) -> dict[str, Tensor]:
    """The same by the reference, in float32."""
    x = x.detach().float().requires_grad_()
    tensors = {key: getattr(module, key).detach().float().clone() for key in ("gate_up", "down")}
    trained = {
        name: p.detach().float().clone().requires_grad_() for name, p in module.named_parameters() if p.requires_grad
    }
    tensors |= trained
    factors = None
    if module.lora is not None:
        names = ["gate_up_A", "gate_up_B", "down_A", "down_B"]
        factors = reference.Factors(
            **dict(zip(names, (tensors[key] for key in FACTORS), strict=True)), scale=module.lora.scale
        )
    y = reference.experts(x, counts, tensors["gate_up"], tensors["down"], factors)
    y.backward(grad.float())
    return {"y": y.detach(), "x": x.grad, **{name: tensor.grad for name, tensor in trained.items()}}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.isfinite(found[name]).all(), name
        largest = value.abs().max() if value.numel() else torch.tensor(0.0)
        error = (found[name].float().cpu() - value.cpu()).abs().max() if value.numel() else torch.tensor(0.0)
        assert error <= tolerance * largest.cpu(), f"{name}: {error} of {largest}"


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 8 * 4 * (6 * F_ + 2 * D), 3 * 8 * 4 * (6 * F_ + 2 * D)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_outputs_and_gradients_are_those_of_the_reference(
    mode: str, resident: bool, counts: list[int], chunk_bytes: int
) -> None:
    module = made(mode, resident, chunk_bytes=chunk_bytes)
    assert module.chunk_rows in (8, 24) or module.chunk_rows > 1000
    x, counts_L, grad = rows_for(module, counts)
    found = run(module, x, counts_L, grad)
    assert set(found) == {"y", "x"} | {"lora": set(FACTORS), "full": {"gate_up", "down"}, "frozen": set()}[mode]
    if sum(counts):
        same(found, wanted(module, x, counts, grad))
    else:
        assert found["y"].shape == (0, D)
        assert all(not value.any() for name, value in found.items())
        assert all(found[name].shape == p.shape for name, p in module.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1])
@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_bfloat16_stays_within_two_percent(mode: str, resident: bool, chunk_bytes: int) -> None:
    module = made(mode, resident, dtype=torch.bfloat16, chunk_bytes=chunk_bytes)
    counts = [40, 0, 95, 17, 60]
    x, counts_L, grad = rows_for(module, counts)
    found = run(module, x, counts_L, grad)
    for name, value in wanted(module, x, counts, grad).items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name].float() - value).norm() <= 0.02 * value.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_cuda_is_the_reference_too(mode: str, resident: bool, counts: list[int], chunk_bytes: int) -> None:
    module = made(mode, resident, dtype=torch.bfloat16, chunk_bytes=chunk_bytes).cuda()
    x, counts_L, grad = rows_for(module, counts)
    found = run(module, x, counts_L, grad)
    for name, value in (wanted(module, x, counts, grad) if sum(counts) else found).items():
        assert torch.isfinite(found[name]).all()
        assert (found[name].float() - value.float()).norm() <= 0.02 * value.float().norm(), name


def test_a_sum_as_loss_gives_gradients() -> None:
    module = made()
    x, counts, _ = rows_for(module, COUNTS["mixed"])
    module(x, counts).sum().backward()  # its gradient is expanded, with stride 0
    found = {"x": x.grad.clone(), **{name: p.grad.clone() for name, p in module.named_parameters()}}
    same(found, {key: run(module, x, counts, torch.ones_like(x))[key] for key in found}, 1e-6)


def test_rows_that_need_no_gradient_get_none() -> None:
    for mode, resident in KINDS[2:]:
        module = made(mode, resident)
        x, counts, grad = rows_for(module, COUNTS["gaps"])
        expected = run(module, x, counts, grad)
        module.zero_grad()
        module(x.detach(), counts).backward(grad)
        same({name: p.grad for name, p in module.named_parameters() if p.requires_grad},
             {name: value for name, value in expected.items() if name not in ("x", "y")}, 0)  # fmt: skip


def test_two_runs_are_equal_bit_for_bit() -> None:
    for chunk_bytes in (1 << 30, 1):
        module = made(chunk_bytes=chunk_bytes)
        arguments = rows_for(module, COUNTS["mixed"])
        same(run(module, *arguments), run(module, *arguments), 0)


# ---- the adapter: start values, strength, dropout


def test_start_values_do_not_depend_on_ep() -> None:
    whole = made(local_experts=range(8)).state_dict()
    for ep in (2, 4):
        parts = [made(local_experts=range(first, first + 8 // ep)).state_dict() for first in range(0, 8, 8 // ep)]
        for key in FACTORS:
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    values = [whole[key][expert] for key in FACTORS for expert in range(8)]
    assert len({tuple(value.flatten()[:4].tolist()) for value in values}) == len(values)


def test_start_values_are_pefts_distribution_and_depend_on_seed_and_name() -> None:
    shape = (64, 300)
    a = initial_lora("layers.0", "gate_up_lora_A", 3, shape, seed=1)
    peft = nn.init.kaiming_uniform_(torch.empty(8 * 64, 300), a=5**0.5)
    assert peft.abs().max() / 1.01 < a.abs().max() <= 300**-0.5
    assert abs(a.std() / peft.std() - 1) < 0.02
    for other in (("layers.0", 4, 1), ("layers.1", 3, 1), ("layers.0", 3, 2)):
        assert not torch.equal(a, initial_lora(other[0], "gate_up_lora_A", other[1], shape, seed=other[2]))
    assert not initial_lora("layers.0", "gate_up_lora_B", 3, shape, seed=1).any()
    module = made()
    module.init_lora()
    assert not module.gate_up_lora_B.any()
    assert not module.down_lora_B.any()
    assert module.down_lora_A.all()


def test_scale() -> None:
    assert ExpertLora(r=16, alpha=8.0).scale == 0.5
    assert ExpertLora(r=16, alpha=8.0, rslora=True).scale == 2.0
    plain, rooted = (made(lora=ExpertLora(r=R_LORA, alpha=6.0, rslora=flag)) for flag in (False, True))
    for module in (plain, rooted):
        x, counts, grad = rows_for(module, COUNTS["mixed"])
        same(run(module, x, counts, grad), wanted(module, x, COUNTS["mixed"], grad))


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1])
def test_dropout_falls_on_the_input_of_a_only(chunk_bytes: int) -> None:
    dropout = 0.4
    module = made(lora=ExpertLora(r=R_LORA, alpha=6.0, dropout=dropout), chunk_bytes=chunk_bytes)
    with torch.no_grad():
        module.down_lora_B.zero_()
    x, counts, grad = rows_for(module, [100, 0, 80, 0, 20])
    x = (torch.eye(D)[3] * 1.5).repeat(200, 1).requires_grad_()  # one feature: it is dropped or it is scaled
    off, on = copy.deepcopy(module), copy.deepcopy(module)
    off.lora, on.lora = (ExpertLora(r=R_LORA, alpha=alpha) for alpha in (0.0, 6.0 / (1 - dropout)))
    dropped, scaled = off(x, counts), on(x, counts)
    y = module(x, counts)
    was_dropped, was_scaled = ((y - other).abs().amax(1) < 1e-5 for other in (dropped, scaled))
    assert (was_dropped ^ was_scaled).all()
    assert abs(was_dropped.float().mean() - dropout) < 0.12
    module.eval()
    same(run(module, x, counts, grad), wanted(module, x, [100, 0, 80, 0, 20], grad))


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1])
def test_dropout_has_the_gradient_of_the_mask_it_used(chunk_bytes: int) -> None:
    module = made(lora=ExpertLora(r=R_LORA, alpha=6.0, dropout=0.4), chunk_bytes=chunk_bytes)
    x, counts, grad = rows_for(module, COUNTS["mixed"])
    wrapped = Checkpointed(module, recompute.contexts("selective"))
    found = []
    for model in (module, wrapped):
        torch.manual_seed(5)
        found.append({name.removeprefix("inner."): value for name, value in run(model, x, counts, grad).items()})
    same(found[1], found[0], 0)
    generator = torch.Generator().manual_seed(2)
    for name in ("x", *FACTORS):
        tensor = x if name == "x" else module.get_parameter(name)
        way = torch.randn(tensor.shape, generator=generator)
        values = []
        for step in (1e-2, -2e-2):
            with torch.no_grad():
                tensor.add_(way, alpha=step)
                torch.manual_seed(5)
                values.append((module(x, counts) * grad).sum())
        with torch.no_grad():
            tensor.add_(way, alpha=1e-2)
        slope, expected = (values[0] - values[1]) / 2e-2, (found[0][name] * way).sum()
        assert abs(slope - expected) < 0.01 * found[0][name].norm() * way.norm() / way.numel() ** 0.5, name


# ---- what is kept, allocated and computed again


class Allocations(TorchDispatchMode):
    """Counts bytes of new storages: the largest, and the most alive at a time."""

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
    """Bytes that the graph holds on to, weights aside."""
    weights = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, counts)
    return sum(seen.values())


def test_the_graph_keeps_what_it_must_and_no_more() -> None:
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
        chunked = made(mode, resident, chunk_bytes=1)
        assert kept_bytes(chunked, x, counts) == 4 * rows * D + offs


@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_memory_of_skewed_routing_is_bounded(mode: str, resident: bool) -> None:
    peaks = []
    for rows in (256, 2048):
        module = made(mode, resident, chunk_bytes=64 * 4 * (6 * F_ + 2 * D))
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


def test_no_allocation_is_as_large_as_an_expert_stack() -> None:
    module = made(hidden=64, intermediate=32)
    x, counts, grad = rows_for(module, [1, 2, 1, 3, 1])
    with Allocations(x, grad, *module.parameters(), *module.buffers()) as seen:
        run(module, x, counts, grad)
    assert 0 < seen.largest < module.down.numel() * 4
    assert sum("grouped_mm" in name for name, _ in seen.calls) == 12


class Checkpointed(nn.Module):
    def __init__(self, module: GroupedExperts, context_fn: Any) -> None:
        super().__init__()
        self.inner, self.context_fn = module, context_fn

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return checkpoint(self.inner, x, counts, use_reentrant=False, context_fn=self.context_fn)


def keep_wide(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    wide = "grouped_mm" in op.name() and min(args[1].shape[1:]) > R_LORA
    return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1])
@pytest.mark.parametrize(("mode", "resident"), KINDS)
@pytest.mark.parametrize("contexts", ["layer", "selective", "torch"])
def test_recompute_changes_nothing(contexts: str, mode: str, resident: bool, chunk_bytes: int) -> None:
    module = made(mode, resident, chunk_bytes=chunk_bytes)
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
    # backward itself: two frozen GEMMs and A of down; thin into wide: B of gate_up in the second pass
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
    assert (larger["gate_up"][:, 2 * F_ :] == 7).all(), "somebody else's memory was written"
    assert (larger["down"][:, :, F_:] == 7).all()


def test_a_changed_adapter_is_seen_by_the_next_call() -> None:
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
def test_built_on_meta_and_filled_later(mode: str, resident: bool) -> None:
    direct = made(mode, resident)
    late = made(mode, resident, device="meta")
    assert all(t.is_meta for t in [*late.parameters(), *late.buffers()])
    late.to_empty(device="cpu")
    with torch.no_grad():
        late.gate_up.copy_(direct.gate_up)
        late.down.copy_(direct.down)
    late.init_lora(b_std=0.3)
    arguments = rows_for(direct, COUNTS["gaps"])
    same(run(late, *arguments), run(direct, *arguments), 0)
    names = {"gate_up", "down"} | (set(FACTORS) if mode == "lora" else set())
    assert set(late.state_dict()) == names
    frozen = {name for name, _ in late.named_buffers()}
    assert frozen == ({"gate_up", "down"} if resident else set())
    assert {name for name, p in late.named_parameters() if p.requires_grad} == {
        "lora": set(FACTORS), "full": {"gate_up", "down"}, "frozen": set()
    }[mode]  # fmt: skip


# ---- parity with PEFT


class OneRank(nn.Module):
    """The reference's routing around the grouped experts."""

    def __init__(self, gate: Tensor, module: GroupedExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, module

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        routing = reference.route(x, self.gate, top_k=2)
        order = routing.topk_TK.flatten().argsort(stable=True)
        y = self.experts(x[order // 2], routing.topk_TK.flatten().bincount(minlength=8))
        weighted = y * routing.scores_TK.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // 2, weighted).view_as(hidden)


def test_parity_with_peft_through_a_whole_model() -> None:
    base, ours = vl_model(), vl_model()
    config = LoraConfig(
        r=R_LORA, lora_alpha=6, target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    theirs = get_peft_model(base, config)
    wrappers = [layer.mlp.experts for layer in base.model.language_model.layers]
    modules = []
    for number, layer in enumerate(ours.requires_grad_(False).model.language_model.layers):
        module = GroupedExperts(
            name=f"layers.{number}", num_experts=8, local_experts=range(8), hidden=48, intermediate=40, mode="lora",
            lora=ExpertLora(r=R_LORA, alpha=6), resident=True, seed=0, dtype=torch.float32,
        )  # fmt: skip
        module.init_lora(b_std=0.2)
        with torch.no_grad():
            module.gate_up.copy_(layer.mlp.experts.gate_up_proj)
            module.down.copy_(layer.mlp.experts.down_proj)
            for part, wrapper in (("gate_up", wrappers[number].base_layer), ("down", wrappers[number])):
                assert wrapper.parameter_name == f"{part}_proj"
                a, b = packing.pack_lora(getattr(module, f"{part}_lora_A"), getattr(module, f"{part}_lora_B"))
                wrapper.lora_A["default"].weight.copy_(a)
                wrapper.lora_B["default"].weight.copy_(b)
        layer.mlp = OneRank(layer.mlp.gate.weight, module)
        modules.append(module)

    tokens = torch.randint(0, 160, (2, 19), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (theirs, ours):
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=torch.ones_like(tokens)).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        results.append({"logits": logits.detach(), "embedded": embedded.grad})
    for number, module in enumerate(modules):
        for part, wrapper in (("gate_up", wrappers[number].base_layer), ("down", wrappers[number])):
            grads = [wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad]
            a, b = packing.unpack_lora("gradient", *grads, experts=8)
            for letter, grad in (("A", a), ("B", b)):
                assert grad.abs().max() > 0
                results[0][f"{number}.{part}.{letter}"] = grad
                results[1][f"{number}.{part}.{letter}"] = getattr(module, f"{part}_lora_{letter}").grad
    same(results[1], results[0])
    assert len(results[0]) == 2 + 2 * 4


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora=ExpertLora(r=6, alpha=1.0)), r"LoRA r 6 cannot be used by the grouped GEMM in float32: .* of 4 "),
        (dict(lora=ExpertLora(r=0, alpha=1.0)), r"LoRA r 0 cannot be used"),
        (dict(lora=ExpertLora(r=4, alpha=1.0), dtype=torch.bfloat16), r"LoRA r 4 .* bfloat16: .* of 8 \(8, 16, 24"),
        (dict(hidden=26), "layers.0.mlp.experts: hidden size 26 cannot be used"),
        (dict(intermediate=22), "expert hidden size 22 cannot be used"),
        (dict(dtype=torch.float16), "experts compute in bfloat16 or float32, not torch.float16"),
        (dict(lora=None), "mode 'lora' with lora=None"),
        (dict(mode="full", lora=ExpertLora(r=4, alpha=1.0)), "give LoRA options in mode 'lora', and only there"),
        (dict(mode="half", lora=None), "mode 'half' is not one of frozen, lora, full"),
        (dict(lora=ExpertLora(r=4, alpha=1.0, dropout=1.0)), r"LoRA dropout 1.0 is not in \[0, 1\)"),
    ],
)  # fmt: skip
def test_what_the_grouped_gemm_or_the_mode_cannot_take_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**{"mode": "lora", **options})

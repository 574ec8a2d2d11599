"""Grouped experts against the reference and against PEFT, their adapter's start values, and their errors."""

import copy
from typing import Any

import pytest
import torch
from expert_cases import CHUNKED, COUNTS, FACTORS, KINDS, R_LORA, Checkpointed, D, made, rows_for, run, same, wanted
from peft import LoraConfig, get_peft_model
from tiny_moe import vl_model
from torch import Tensor, nn

from moe import packing, recompute, reference
from moe.experts import ExpertLora, GroupedExperts, initial_lora


@pytest.mark.parametrize("chunks", CHUNKED.values(), ids=CHUNKED.keys())
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_outputs_and_gradients_match_the_reference(
    mode: str, resident: bool, counts: list[int], chunks: dict[str, int]
) -> None:
    module = made(mode, resident, **chunks)
    assert module.chunk_rows in (8, 24) or not chunks
    x, counts_L, grad = rows_for(module, counts)
    found = run(module, x, counts_L, grad)
    assert set(found) == {"y", "x"} | {"lora": set(FACTORS), "full": {"gate_up", "down"}, "frozen": set()}[mode]
    if sum(counts):
        same(found, wanted(module, x, counts, grad))
    else:
        assert found["y"].shape == (0, D)
        assert all(not value.any() for name, value in found.items())
        assert all(found[name].shape == p.shape for name, p in module.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("chunks", CHUNKED.values(), ids=CHUNKED.keys())
@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_bfloat16_stays_within_two_percent(mode: str, resident: bool, chunks: dict[str, int]) -> None:
    module = made(mode, resident, dtype=torch.bfloat16, **chunks)
    counts = [40, 0, 95, 17, 60]
    x, counts_L, grad = rows_for(module, counts)
    found = run(module, x, counts_L, grad)
    for name, value in wanted(module, x, counts, grad).items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name].float() - value).norm() <= 0.02 * value.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunks", CHUNKED.values(), ids=CHUNKED.keys())
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("mode", "resident"), KINDS)
def test_cuda_matches_the_reference_too(mode: str, resident: bool, counts: list[int], chunks: dict[str, int]) -> None:
    module = made(mode, resident, dtype=torch.bfloat16, **chunks).cuda()
    x, counts_L, grad = rows_for(module, counts)
    found = run(module, x, counts_L, grad)
    for name, value in (wanted(module, x, counts, grad) if sum(counts) else found).items():
        assert torch.isfinite(found[name]).all()
        assert (found[name].float() - value.float()).norm() <= 0.02 * value.float().norm(), name


def test_a_sum_as_loss_gives_gradients() -> None:
    module = made()
    x, counts, _ = rows_for(module, COUNTS["mixed"])
    module(x, counts).sum().backward()  # the gradient of a sum is expanded, with stride 0
    found = {"x": x.grad.clone(), **{name: p.grad.clone() for name, p in module.named_parameters()}}
    same(found, {key: run(module, x, counts, torch.ones_like(x))[key] for key in found}, 1e-6)


def test_rows_that_need_no_gradient_get_none() -> None:
    for mode, resident in KINDS[2:]:
        module = made(mode, resident)
        x, counts, grad = rows_for(module, COUNTS["gaps"])
        expected = run(module, x, counts, grad)
        module.zero_grad()
        module(x.detach(), counts).backward(grad)
        same(
            {name: p.grad for name, p in module.named_parameters() if p.requires_grad},
            {name: value for name, value in expected.items() if name not in ("x", "y")},
            0,
        )


def test_two_runs_are_equal_bit_for_bit() -> None:
    for chunks in CHUNKED.values():
        module = made(**chunks)
        arguments = rows_for(module, COUNTS["mixed"])
        same(run(module, *arguments), run(module, *arguments), 0)


# ---- the adapter: start values, scale, dropout


def test_start_values_do_not_depend_on_ep() -> None:
    whole = made(local_experts=range(8)).state_dict()
    for ep in (2, 4):
        parts = [made(local_experts=range(first, first + 8 // ep)).state_dict() for first in range(0, 8, 8 // ep)]
        for key in FACTORS:
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    values = [whole[key][expert] for key in FACTORS for expert in range(8)]
    assert len({tuple(value.flatten()[:4].tolist()) for value in values}) == len(values)


def test_start_values_have_pefts_distribution_and_depend_on_seed_and_name() -> None:
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


@pytest.mark.parametrize("chunks", CHUNKED.values(), ids=CHUNKED.keys())
def test_dropout_masks_only_the_input_of_a(chunks: dict[str, int]) -> None:
    dropout = 0.4
    module = made(lora=ExpertLora(r=R_LORA, alpha=6.0, dropout=dropout), **chunks)
    with torch.no_grad():
        module.down_lora_B.zero_()
    x, counts, grad = rows_for(module, [100, 0, 80, 0, 20])
    x = (torch.eye(D)[3] * 1.5).repeat(200, 1).requires_grad_()  # one feature, which is either dropped or scaled
    off, on = copy.deepcopy(module), copy.deepcopy(module)
    off.lora, on.lora = (ExpertLora(r=R_LORA, alpha=alpha) for alpha in (0.0, 6.0 / (1 - dropout)))
    dropped, scaled = off(x, counts), on(x, counts)
    y = module(x, counts)
    was_dropped, was_scaled = ((y - other).abs().amax(1) < 1e-5 for other in (dropped, scaled))
    assert (was_dropped ^ was_scaled).all()
    assert abs(was_dropped.float().mean() - dropout) < 0.12
    module.eval()
    same(run(module, x, counts, grad), wanted(module, x, [100, 0, 80, 0, 20], grad))


def test_dropout_is_unbiased_in_bfloat16() -> None:
    r = 8
    module = made(lora=ExpertLora(r=r, alpha=6.0, dropout=0.1), dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in (module.gate_up_lora_B, module.down, module.down_lora_A, module.down_lora_B):
            tensor.zero_()
        for factor in (module.down_lora_A, module.down_lora_B):  # then y is the scale times some features of h
            factor.diagonal(dim1=1, dim2=2).fill_(1.0)
    x = torch.randn(4000, module.hidden, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    counts = torch.tensor([4000, *[0] * (len(module.local_experts) - 1)])
    torch.manual_seed(1)
    with torch.no_grad():
        dropped, whole = module(x, counts).double(), module.eval()(x, counts).double()
    kept = dropped[:, :r] != 0
    ratio = (dropped[:, :r][kept] / whole[:, :r][kept]).mean()
    assert kept.double().mean() == pytest.approx(0.9, abs=0.01)
    assert float(ratio) == pytest.approx(1 / 0.9, rel=2e-4)


@pytest.mark.parametrize("chunks", CHUNKED.values(), ids=CHUNKED.keys())
def test_dropout_has_the_gradient_of_the_mask_it_used(chunks: dict[str, int]) -> None:
    module = made(lora=ExpertLora(r=R_LORA, alpha=6.0, dropout=0.4), **chunks)
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
    base, ours = vl_model(experts=8), vl_model(experts=8)
    config = LoraConfig(
        r=R_LORA,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = get_peft_model(base, config)
    wrappers = [layer.mlp.experts for layer in base.model.language_model.layers]
    modules = []
    for number, layer in enumerate(ours.requires_grad_(False).model.language_model.layers):
        module = GroupedExperts(
            name=f"layers.{number}",
            num_experts=8,
            local_experts=range(8),
            hidden=48,
            intermediate=40,
            mode="lora",
            lora=ExpertLora(r=R_LORA, alpha=6),
            resident=True,
            seed=0,
            dtype=torch.float32,
        )
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


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora=ExpertLora(r=6, alpha=1.0)), r"LoRA r 6 cannot be used by the grouped GEMM in float32: .* of 4 "),
        (dict(lora=ExpertLora(r=0, alpha=1.0)), r"LoRA r 0 cannot be used"),
        (dict(lora=ExpertLora(r=4, alpha=1.0), dtype=torch.bfloat16), r"LoRA r 4 .* bfloat16: .* of 8 \(8, 16, 24"),
        (dict(hidden=26), "layers.0.mlp.experts: hidden size 26 cannot be used"),
        (dict(intermediate=22), "expert hidden size 22 cannot be used"),
        (dict(dtype=torch.float16), "experts compute in bfloat16 or float32, not torch.float16"),
        (dict(lora=None), "mode is 'lora' and lora=None"),
        (dict(mode="full", lora=ExpertLora(r=4, alpha=1.0)), "give LoRA options in mode 'lora', and only there"),
        (dict(mode="half", lora=None), "mode must be one of frozen, lora, full, got 'half'"),
        (dict(lora=ExpertLora(r=4, alpha=1.0, dropout=1.0)), "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_that_the_grouped_gemm_or_the_mode_does_not_allow_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(**{"mode": "lora", **options})

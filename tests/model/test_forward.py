"""The wrapper against transformers alone: every mix of media, every attention, and ranks with different media."""

from dataclasses import replace
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from base_folders import dense_model
from packed_rows import SPEC, alone, row
from tiny_moe import IMAGE, text_model, vl_model
from torch.nn.attention.varlen import varlen_attn

from finetune.model.forward import PackedModel
from finetune.model.varlen import machine, register, segments, varlen
from finetune.settings.attention import MASK_TOKENS, Machine, choose_attention
from moe.parallel import LayerOptions, replace_moe_blocks

ROWS = (("", "i", "ji"), ("v", "", "wv"), ("vi", "iw", ""), ("", ""), ())
"""Packed rows by their samples' media: i and j are images, v and w videos; the last row is a rank's dummy."""


def packed(
    model: Any,
    *,
    attention: str = "segments",
) -> PackedModel:
    register()
    model.set_attn_implementation({"text_config": attention, "vision_config": attention})
    return PackedModel(model, spec=SPEC)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[float]]]:
    """Return the loss of each sample by transformers' plain models."""
    models = {"moe": vl_model(), "dense": dense_model()}
    with torch.no_grad():
        return {kind: [[float(x) for x in alone(m, row(*mixes))] for mixes in ROWS] for kind, m in models.items()}


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_packed_row_has_the_losses_of_its_samples_alone(kind, attention, expected):
    model = vl_model() if kind == "moe" else dense_model()
    if kind == "moe":
        replace_moe_blocks(model, ep_size=1, options=LayerOptions())
    wrapped, calls = packed(model, attention=attention), []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for mixes, wanted in zip(ROWS, expected[kind], strict=True):
            losses = wrapped(batch=row(*mixes))
            assert losses.ce_S.tolist() == pytest.approx(wanted, rel=1e-5)
            assert float(losses.objective) == pytest.approx(sum(wanted), rel=1e-5)
    assert len(calls) == len(ROWS)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_the_tower_takes_all_precomputed_arguments(kind):
    """Their names are private to transformers: if one changes, the tower computes the value itself and waits for it."""
    model = vl_model() if kind == "moe" else dense_model()
    wrapped, handed = packed(model), []
    model.model.visual.blocks[0].register_forward_pre_hook(lambda *it: handed.append(it[-1]), with_kwargs=True)
    with torch.no_grad():
        wrapped(batch=row("v", "i"))
    assert handed[0].keys() == {"cu_seqlens", "max_seqlen", "position_embeddings", "borders"}
    assert handed[0]["borders"] == (0, 24, 32, 40, 48) == tuple(handed[0]["cu_seqlens"].tolist())
    assert handed[0]["max_seqlen"] == 24


def test_a_row_on_the_cpu_is_not_copied():
    wrapped, batch = packed(dense_model()), row("vi", "")
    sent = wrapped.send(batch, torch.device("cpu")).arrived()
    for name in ("input_ids", "positions", "cu_seq_lens", "image_patches", "video_patches"):
        assert getattr(sent.batch, name).data_ptr() == getattr(batch, name).data_ptr(), name


def test_a_frozen_tower_is_not_called_for_text():
    model, calls = dense_model(), []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    wrapped = packed(model)
    wanted = [wrapped(batch=row(*mixes)).ce_S.tolist() for mixes in ROWS]
    model.model.visual.requires_grad_(False)
    found = [wrapped(batch=row(*mixes)).ce_S.tolist() for mixes in ROWS]
    assert found == wanted
    assert len(calls) == len(ROWS) + sum(any(mixes) for mixes in ROWS)


def test_tokens_and_patches_must_match_in_number():
    batch = row("i")
    wrong = replace(batch, input_ids=batch.input_ids.masked_fill(batch.input_ids == IMAGE, 7))
    with pytest.raises(
        ValueError, match="s/i: the row has 0 tokens for images, but their patches make 6. The chat template"
    ):
        packed(dense_model())(batch=wrong)


def test_attention_without_borders_is_refused():
    model = dense_model()
    packed(model)
    batch = row("", "i")
    with pytest.raises(ValueError, match="called without the borders of its samples.*model.attention: sdpa"):
        model.model.language_model(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)


def test_a_text_only_model_needs_no_tower_and_takes_no_media():
    model = text_model()
    register()
    model.set_attn_implementation("segments")
    with pytest.raises(ValueError, match=r"the model has no vision tower, but spec is VisionSpec.*else None"):
        PackedModel(model, spec=SPEC)
    wrapped = PackedModel(model, spec=None)
    with torch.no_grad():
        batch, plain = row("", ""), text_model()
        cuts = batch.cu_seq_lens.tolist()
        for number, loss in enumerate(wrapped(batch=batch).ce_S.tolist()):
            part = slice(cuts[number], cuts[number + 1])
            ids, weights = batch.input_ids[:, part], batch.loss_weights[0, part]
            logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]
            ce = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            assert loss == pytest.approx(float((ce * weights[1:]).sum()), rel=1e-5)
    with pytest.raises(ValueError, match=r"images or videos, but the model has no vision tower: s/i\. Use a vision-"):
        wrapped(batch=row("i"))
    with pytest.raises(ValueError, match="the model has a vision tower, but spec is None"):
        PackedModel(dense_model(), spec=None)


@pytest.mark.parametrize("lacks", [(), ("enable_gqa",)], ids=["this torch", "torch 2.11"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_is_called_with_arguments_that_it_has(lacks, key_heads, monkeypatch):
    """The kernel itself needs CUDA: attention by its definition replaces it, with the kernel's signature."""
    whole = signature(varlen_attn)
    taken = whole.replace(parameters=[one for name, one in whole.parameters.items() if name not in lacks])
    assert [one.kind for one in taken.parameters.values()].count(Parameter.VAR_KEYWORD) == 0

    def by_hand(*args, **kwargs):
        bound = taken.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        query, key, value, cuts = (given[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert given.get("enable_gqa", key_heads != 4) == (key_heads != 4)
        assert (given["window_size"], given["max_q"], given["max_k"]) == ((-1, 0), 14, 14)
        key, value = (x.repeat_interleave(4 // key_heads, dim=1) for x in (key, value))
        owner = torch.bucketize(torch.arange(len(query)), cuts[1:], right=True)
        scores = torch.einsum("qhd,khd->hqk", query, key) * given["scale"]
        hidden = (owner[:, None] != owner) | torch.ones_like(scores[0]).triu(1).bool()
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)

    by_hand.__signature__ = taken
    monkeypatch.setattr("finetune.model.varlen.varlen_attn", by_hand)
    generator = torch.Generator().manual_seed(0)
    row = [torch.randn(1, heads, 21, 8, generator=generator) for heads in (4, key_heads, key_heads)]
    borders = {"cu_seq_lens_q": torch.tensor([0, 6, 7, 21], dtype=torch.int32), "max_length_q": 14, "scaling": 0.3}
    (found, _), (wanted, _) = (each(SimpleNamespace(is_causal=True), *row, **borders) for each in (varlen, segments))
    torch.testing.assert_close(found, wanted)


def test_choice_of_attention():
    h100 = Machine(cuda=True, half=True, capability=(9, 0), flash_attention_2=True)
    bare = Machine(cuda=True, half=True, capability=(9, 0))
    old = Machine(cuda=True, half=True, capability=(7, 5), flash_attention_2=True)
    wide = Machine(cuda=True, half=False, capability=(9, 0))
    cpu = Machine(cuda=False, half=True)
    names = [choose_attention("auto", tokens=10**6, machine=m).name for m in (h100, bare, old, wide, cpu)]
    assert names == ["flash_attention_2", "varlen", "segments", "segments", "segments"]
    assert "flash-attn is not installed" in choose_attention("auto", tokens=9, machine=bare).reason
    assert choose_attention("sdpa", tokens=MASK_TOKENS, machine=cpu).name == "sdpa"
    with pytest.raises(
        ValueError, match=r"sdpa builds a mask of 16,384 x 16,384 .*256 MiB\); the limit is 8,192 .*varl"
    ):
        choose_attention("sdpa", tokens=16384, machine=bare)
    with pytest.raises(
        ValueError, match=r"varlen cannot be used: no CUDA device\. Use auto, which selects segments here"
    ):
        choose_attention("varlen", tokens=9, machine=cpu)
    with pytest.raises(ValueError, match="capability 7.5, but the kernel needs 8.0"):
        choose_attention("flash_attention_2", tokens=9, machine=old)
    with pytest.raises(ValueError, match="varlen cannot be used: the model computes in float32"):
        choose_attention("varlen", tokens=9, machine=wide)
    with pytest.raises(
        ValueError, match=r"model.attention must be one of auto, flash_attention_2, varlen.*, got 'eager'"
    ):
        choose_attention("eager", tokens=9, machine=cpu)
    assert machine(torch.device("cpu"), torch.bfloat16) == cpu
    assert choose_attention("auto", tokens=9, machine=h100, head_sizes=(128, 72)).name == "flash_attention_2"
    tiny = choose_attention("auto", tokens=9, machine=h100, head_sizes=(16, 12))
    assert tiny.name == "segments"
    assert "varlen: a head size is 12, but the kernel needs multiples of 8" in tiny.reason

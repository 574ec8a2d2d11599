"""The FLOP meter against torch's own counter and published throughputs, and the effects of packing and recompute."""

import pytest
import torch
from base_folders import dense_model
from packed_rows import alone, row
from torch.utils.flop_counter import FlopCounterMode

from finetune.architecture.families import Family, Text, Vision, family
from finetune.architecture.flops import FlopMeter, Training, Work, batch_work, trainings
from finetune.config import AdaptersConfig, DensePartConfig, ExpertPartConfig, PartConfig

FULL = Training(mode="full")
TEXT = {part: FULL for part in ("attention", "mlp", "head", "embeddings", "norms")}
TOWER = {part: FULL for part in ("vision_blocks", "patch_embed", "pos_embed", "merger", "deepstack_mergers")}
TEXT_SIZES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
)
VISION_SIZES = "out_hidden_size depth hidden_size intermediate_size num_heads patch_size num_position_embeddings"
GB, HUGE = "qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b"
LORA16 = {part: Training(mode="lora", r=16) for part in ("attention", "experts")}


def tokens(number: int) -> Work:
    """Return the work of one sample with every token supervised."""
    return Work(tokens=number, supervised=number, squares=number**2)


def tiny_family(model) -> Family:
    """Return the small dense model of the tests as a family."""
    text, vision = model.config.text_config, model.config.vision_config
    levels = {"deepstack_visual_indexes": tuple(vision.deepstack_visual_indexes)}
    return Family(
        name="small",
        text=Text(**{name: getattr(text, name) for name in TEXT_SIZES.split()}),
        vision=Vision(**{name: getattr(vision, name) for name in VISION_SIZES.split()}, **levels),
    )


def counted(model, batch) -> float:
    """Return the operations that torch counts in a forward and backward of each sample alone, with full logits."""
    with FlopCounterMode(display=False) as counter:
        losses = torch.stack(alone(model, batch)).sum()
        if losses.requires_grad:
            losses.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("trains", "names"),
    [
        (TEXT | TOWER, ("",)),
        (TEXT, ("language_model", "lm_head")),
        ({"embeddings": FULL}, ("embed_tokens",)),
        ({"head": FULL}, ("lm_head",)),
        ({}, ()),
    ],
    ids=["all", "text", "embedding", "head", "nothing"],
)
def test_counts_match_torchs_own(trains, names):
    model = dense_model()
    model.set_attn_implementation("eager")  # its scores are plain products, which torch counts, without causality
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    batch = row("iv", "i", length=60)
    work = batch_work(batch)
    lengths = [
        last - first for first, last in zip(batch.cu_seq_lens.tolist(), batch.cu_seq_lens.tolist()[1:3], strict=False)
    ]
    assert (work.tokens, work.squares) == (sum(lengths), sum(n * n for n in lengths))
    # without tiles the head sees every token, and a square that is not halved
    seen = Work(
        tokens=work.tokens,
        supervised=work.tokens,
        squares=2 * work.squares,
        patches=work.patches,
        frame_squares=work.frame_squares,
    )
    expected = FlopMeter(tiny_family(model), trains).model(seen)
    assert counted(model, batch) == pytest.approx(expected, rel=2e-3)  # torch counts the rotary tables too


@pytest.mark.parametrize(
    ("name", "rate", "published"), [(GB, 12_040, 277), (HUGE, 1_862, 276), (HUGE, 6_131, 907)]
)  # tokens per second and device, TFLOP/s
def test_published_throughputs_within_one_percent(name, rate, published):
    full = {part: FULL for part in ("attention", "experts", "router", "norms", "embeddings", "head")}
    teraflops = FlopMeter(family(name), full).model(tokens(4096)) / 4096 * rate / 1e12
    assert teraflops == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("name", "length", "plain", "again"),
    [(GB, 4096, 18.1, 25.3), (GB, 32768, 57.6, 76.0), (HUGE, 4096, 109.6, 158.2), (HUGE, 262144, 1500, 1947)],
)  # GFLOP per token on the device, computed by hand for LoRA of rank 16
def test_frozen_base_with_lora(name, length, plain, again):
    for recompute, expected in (("none", plain), ("layer", again)):
        meter = FlopMeter(family(name), LORA16, recompute=recompute)
        assert meter.hardware(tokens(length)) / length / 1e9 == pytest.approx(expected, rel=5e-3)
        assert meter.model(tokens(length)) == FlopMeter(family(name), LORA16).model(tokens(length))
    selective = FlopMeter(family(name), LORA16, recompute="selective")
    saved = FlopMeter(family(name), LORA16, recompute="layer").hardware(tokens(length)) - selective.hardware(
        tokens(length)
    )
    text = family(name).text
    wide = 2 * 3 * text.hidden_size * text.experts.moe_intermediate_size * 8 * text.num_hidden_layers
    assert saved == pytest.approx(wide * length)


def test_packing_costs_the_sum_of_squares_and_padding_nothing():
    meter = FlopMeter(family(GB), LORA16)
    one, two = meter.count(tokens(4096)), meter.count(tokens(2048) + tokens(2048))
    assert two["attention_scores"].model * 2 == one["attention_scores"].model
    assert two["experts"] == one["experts"]
    assert batch_work(row()) == Work()
    padded = batch_work(row("i", length=10))
    assert padded.tokens < row("i", length=10).input_ids.shape[1]
    assert padded.patches == 24
    assert batch_work(row("w")).frame_squares == 2 * 8**2


def test_a_frozen_tower_has_no_backward_and_a_trained_merger_does_not_reach_the_blocks():
    seen = Work(tokens=100, squares=10_000, patches=400, frame_squares=160_000)
    frozen = FlopMeter(family(GB), LORA16).count(seen)
    assert frozen["vision_blocks"].forward / 100 == pytest.approx(3.289e9, rel=1e-3)
    assert [frozen[part].backward for part in ("vision_blocks", "merger", "vision_scores")] == [0, 0, 0]
    merger = FlopMeter(family(GB), {"merger": FULL}, recompute="layer").count(seen)
    assert (merger["merger"].backward, merger["vision_blocks"].backward) == (2 * merger["merger"].forward, 0)
    assert merger["vision_blocks"].again == merger["deepstack_mergers"].backward == 0
    assert merger["attention"].backward == merger["attention"].forward == merger["attention"].again
    blocks = FlopMeter(family(GB), {"vision_blocks": Training(mode="lora", r=8)}, recompute="layer").count(seen)
    assert blocks["vision_blocks"].again == blocks["vision_blocks"].forward > frozen["vision_blocks"].forward
    assert blocks["merger"].backward == blocks["merger"].forward
    tied = FlopMeter(family("qwen3-vl-2b"), {}).count(Work(tokens=3, supervised=3))
    assert tied["head"].forward == 2 * 3 * 151_936 * 2048


def test_trainings_of_a_configuration():
    adapters = AdaptersConfig(
        attention=DensePartConfig(mode="lora", r=16),
        experts=ExpertPartConfig(mode="lora", r=4),
        head=PartConfig(mode="full"),
    )
    trained = {part: training for part, training in trainings(adapters).items() if training.mode != "frozen"}
    assert trained == {"attention": Training(mode="lora", r=16), "experts": Training(mode="lora", r=4), "head": FULL}
    FlopMeter(family("tiny-dense"), {"attention": FULL})


def test_errors_of_the_meter():
    with pytest.raises(ValueError, match=r"parts expert: qwen3-vl-30b-a3b has no such part; it has attention, "):
        FlopMeter(family(GB), {"expert": FULL})
    with pytest.raises(ValueError, match="part attention: mode lora with r 0; LoRA needs r >= 1, other modes r 0"):
        FlopMeter(family(GB), {"attention": Training(mode="lora")})

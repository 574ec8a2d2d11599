"""Tests of YaRN: frequencies follow the formula, both spellings are read, and known traps of config.json are caught."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bases import base
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRotaryEmbedding

from data.config import DataConfig, ImageConfig, SourceConfig
from data.open import open_corpus, open_stream
from data.render.sample import Renderer
from data.stream.reach import Reach, reach
from finetune.architecture.families import family
from finetune.architecture.yarn import (
    Extension,
    check_rotary,
    extended_config,
    extended_rope,
    extension,
    need_lines,
    rotary,
    serving_lines,
)
from finetune.config import ContextConfig, YarnConfig
from finetune.files.hubconfig import hub_config, read_family, to_hub_spelling
from finetune.model.build import extend
from finetune.settings.check_context import context_problems
from launchers.cli import main

BIG = family("qwen3-vl-30b-a3b")
THREE = Extension(factor=3.0, original=262_144, length=1_000_000)


def paper(theta: float, dim: int, factor: float, original: int) -> torch.Tensor:
    """Return YaRN's blend of stretched and plain frequencies in float64, written from its description."""
    even = torch.arange(0, dim, 2, dtype=torch.float64)
    plain = theta ** (-even / dim)
    wavelengths = original / torch.tensor([32, 1], dtype=torch.float64)
    first, last = (dim * torch.log(w / (2 * torch.pi)) / (2 * np.log(theta)) for w in wavelengths)
    first, last = first.floor().clamp(min=0), last.ceil().clamp(max=dim - 1)
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return plain * keep + plain / factor * (1 - keep)


def embedding(config: dict, folder: Path) -> Qwen3VLMoeTextRotaryEmbedding:
    """Return the rotary embedding that transformers builds from a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return Qwen3VLMoeTextRotaryEmbedding(AutoConfig.from_pretrained(folder).text_config)


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_every_reader_gets_the_frequencies_of_the_formula(factor: float, tmp_path: Path) -> None:
    extended = Extension(factor=factor, original=262_144, length=int(factor * 262_144))
    want = rotary(extended_rope(BIG.text.rope, extended), 128)
    reference = paper(5e6, 128, factor, 262_144)
    torch.testing.assert_close(torch.tensor(want.inv_freq, dtype=torch.float64), reference, rtol=1e-12, atol=0)
    assert want.scaling == pytest.approx(0.1 * np.log(factor) + 1, rel=1e-12)
    made = extended_config(hub_config(BIG), extended)
    text = made["text_config"]
    for name, spelling in {
        "both": text,
        "hub": {key: value for key, value in text.items() if key != "rope_parameters"},
        "v5": {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_theta")},
    }.items():
        table = embedding(made | {"text_config": spelling}, tmp_path / name)
        torch.testing.assert_close(table.inv_freq.double(), reference, rtol=1e-6, atol=0)
        assert table.attention_scaling == pytest.approx(want.scaling, abs=1e-6)
        assert list(table.mrope_section) == [24, 20, 20]
        read = read_family(tmp_path / name)
        assert read.text.rope == extended_rope(BIG.text.rope, extended), name
        assert read.text.max_position_embeddings == extended.length
    assert text["rope_scaling"]["mrope_interleaved"] is True
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 5_000_000


def test_time_height_and_width_stay_interleaved(tmp_path: Path) -> None:
    table = embedding(extended_config(hub_config(BIG), THREE), tmp_path)
    positions = torch.randint(0, 700_000, (3, 1, 40), generator=torch.Generator().manual_seed(0))
    cos, _ = table(torch.zeros(1, 40, 8), positions)
    channel = torch.arange(64)
    axis = torch.where((channel % 3 == 1) & (channel < 60), 1, torch.where((channel % 3 == 2) & (channel < 60), 2, 0))
    angles = positions[axis, 0].T.float() * table.inv_freq
    expected = torch.cat([angles, angles], -1).cos() * rotary(extended_rope(BIG.text.rope, THREE), 128).scaling
    torch.testing.assert_close(cos[0], expected, rtol=0, atol=1e-6)
    assert axis.bincount().tolist() == [24, 20, 20]


def test_an_edit_of_a_loaded_config_keeps_theta_and_sections(tmp_path: Path) -> None:
    """Setting rope_scaling, as old recipes do, would lose theta."""
    embedding(hub_config(BIG), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    extend(config, None)
    assert config.text_config.rope_parameters["rope_type"] == "default"
    extend(config, THREE)
    assert config.text_config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 262_144,
        "rope_theta": 5_000_000,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    assert config.text_config.max_position_embeddings == 1_000_000


def test_without_an_extension_config_json_is_the_published_one() -> None:
    assert extended_config(hub_config(BIG), None) == hub_config(BIG)
    yarn = extended_config(hub_config(BIG), THREE)
    assert extended_config(to_hub_spelling(yarn), None) == yarn


YARN = {
    "rope_type": "yarn",
    "factor": 3.0,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
    "original_max_position_embeddings": 262_144,
}
TRAPS = {
    "v5 block without theta": ({"rope_scaling": None, "rope_theta": None, "rope_parameters": YARN}, "lacks text"),
    "hub block without theta": ({"rope_theta": None, "rope_scaling": YARN}, "lacks text_config.rope_theta"),
    "two blocks that differ": (
        {"rope_parameters": {**YARN, "rope_type": "default", "rope_theta": 5_000_000}, "rope_scaling": YARN},
        "rope_scaling and rope_parameters differ in rope_type",
    ),
    "two blocks, theta in one": (
        {"rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 5_000_000}, "rope_scaling": YARN},
        "differ in rope_theta",
    ),
    "two blocks, no theta beside": (
        {"rope_theta": None, **dict.fromkeys(["rope_parameters", "rope_scaling"], {**YARN, "rope_theta": 5_000_000})},
        "no rope_theta next to it: transformers would then use its default, 500000",
    ),
    "no original length": (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": None}},
        "without them the ramp would be wrong",
    ),
    "no factor": ({"rope_scaling": {**YARN, "factor": None}}, "rope_type yarn needs factor"),
    "a key nobody reads": ({"rope_scaling": {**YARN, "attn_factor": 1.0}}, "rope_scaling.attn_factor would be ignored"),
    "factor without yarn": ({"rope_scaling": {**YARN, "rope_type": "default"}}, "so factor 3 would be ignored"),
    "sections lost": ({"rope_scaling": {**YARN, "mrope_section": None}}, "rope_scaling.mrope_section"),
    "interleaving lost": ({"rope_scaling": {**YARN, "mrope_interleaved": None}}, "scaling.mrope_interleaved"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_of_a_config_json_is_reported(trap: str, tmp_path: Path) -> None:
    changes, message = TRAPS[trap]
    config = hub_config(BIG)
    text = config["text_config"] | changes
    text = {key: _without_none(value) for key, value in text.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text}))
    with pytest.raises(ValueError, match=message):
        read_family(tmp_path)


def _without_none(value: object) -> object:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def test_a_block_at_the_top_level_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hub_config(BIG) | {"rope_scaling": YARN}))
    with pytest.raises(ValueError, match="rope_scaling is at the top level, where the text model does not read it"):
        read_family(tmp_path)


def built_model(config: dict, folder: Path) -> SimpleNamespace:
    """Return a stand-in for a built model, with its rotary embedding only."""
    return SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(rotary_emb=embedding(config, folder))))


def test_a_built_model_is_checked_against_the_formula(tmp_path: Path) -> None:
    plain, yarn = hub_config(BIG), extended_config(hub_config(BIG), THREE)
    assert "yarn x 3 over 262,144, theta 5,000,000" in check_rotary(built_model(yarn, tmp_path), BIG, THREE)
    assert "64 frequencies equal the float64 formula" in check_rotary(built_model(plain, tmp_path), BIG, None)
    wrong = {
        "plain frequencies": (plain, THREE),
        "yarn without an extension": (yarn, None),
        "default theta": (_edited(yarn, rope_theta=500_000), THREE),
        "ramp over the new length": (_edited(yarn, original_max_position_embeddings=1_000_000), THREE),
    }
    for name, (config, extended) in wrong.items():
        with pytest.raises(ValueError, match="rotary positions differ from its configuration"):
            check_rotary(built_model(config, tmp_path / name), BIG, extended)
    blurred = built_model(yarn, tmp_path)
    blurred.model.language_model.rotary_emb.bfloat16()
    with pytest.raises(ValueError, match="the rotary frequencies must be float32, got bfloat16: in fewer bits, pos"):
        check_rotary(blurred, BIG, THREE)
    with pytest.raises(ValueError, match="the model has 64 rotary frequencies, but tiny-moe has 8"):
        check_rotary(built_model(yarn, tmp_path), family("tiny-moe"), None)
    other = built_model(yarn, tmp_path)
    other.model.language_model.rotary_emb.mrope_section = [20, 24, 20]
    with pytest.raises(ValueError, match=r"by \[20, 24, 20\], but config.json says \[24, 20, 20\]"):
        check_rotary(other, BIG, THREE)


def _edited(config: dict, **values: object) -> dict:
    text = dict(config["text_config"])
    for key in ("rope_scaling", "rope_parameters"):
        text[key] = text[key] | {k: v for k, v in values.items() if k in text[key]}
    text |= {k: v for k, v in values.items() if k in text}
    return config | {"text_config": text}


def context(length: int | None = None, factor: float | None = None) -> ContextConfig:
    return ContextConfig(length=length, yarn=YarnConfig(factor=factor))


def test_the_context_section_is_checked_against_the_base() -> None:
    assert extension(context(), BIG) is None
    assert extension(context(factor=2), BIG) == Extension(factor=2, original=262_144, length=524_288)
    assert extension(context(1_000_000, 3), BIG) == THREE

    def problems(config: ContextConfig, row: int = 8192) -> list[str]:
        return [f"{p.level}: {p}" for p in context_problems(config, BIG, longest_row=row)]

    assert problems(context()) == problems(context(factor=3), 700_000) == problems(context(1_000_000, 3)) == []
    assert "it must be a factor above 1" in problems(context(factor=0.5))[0]
    (four,) = problems(context(factor=4))
    assert four.startswith("warning: context.yarn.factor = 4")
    assert "Set 2 or 3" in four
    assert "it must be at least 1" in problems(context(0))[0]
    assert "Set context.yarn.factor=3, or leave context.length out" in problems(context(700_000))[0]
    assert "serves 262,144 positions; a shorter context" in problems(context(4096))[0]
    assert problems(context(), 300_000)[0].startswith("warning: data.tokens_per_pack = 300000")


def test_the_largest_position_decides() -> None:
    def lines(extended: Extension | None, largest: int) -> list[str]:
        return need_lines(BIG, extended, largest=largest, exact=True, sample="s/1")

    assert lines(None, 97_744)[0].endswith("position in the data is 97,744 (s/1), within the base's 262,144")
    assert "Set context.yarn.factor=2 (a factor of 1.14 is needed)" in lines(None, 300_000)[0]
    assert [line.startswith("warning") for line in lines(THREE, 97_744)] == [False, True]
    assert "is not needed" in lines(THREE, 97_744)[1]
    assert len(lines(THREE, 700_000)) == 1
    assert "reaches position 786,432" in lines(THREE, 900_000)[1]


def test_serving_advice_is_given_if_a_server_computes_differently() -> None:
    assert serving_lines(BIG, None) == []
    sglang, vllm, older = serving_lines(BIG, THREE)
    assert "--context-length 1000000" in sglang
    assert "--max-model-len 1000000" in vllm
    assert "20 of 64 frequencies would differ, by up to 67%" in older
    overrides = json.loads(older.split("--hf-overrides '")[1].removesuffix("'"))["text_config"]["rope_parameters"]
    rope = extended_rope(BIG.text.rope, THREE)
    served = rotary(rope, 128, ramp_over=4 * overrides["original_max_position_embeddings"])
    assert served == rotary(rope, 128), "with these flags the server uses our ramp"


def test_positions_of_a_corpus_come_from_its_samples(tmp_path: Path) -> None:
    Image.new("RGB", (320, 320)).save(tmp_path / "a.png")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Black."}],
            "images": ["a.png"],
        },
        {"messages": [{"role": "user", "content": "Count. " * 9}, {"role": "assistant", "content": "One."}]},
        {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"mine": SourceConfig(path=str(tmp_path / "rows.jsonl"))}
    data = DataConfig(sources=source, packs_per_step=1, workers=0, image=ImageConfig(min_tokens=90, max_tokens=110))
    renderer = Renderer(base(), image=data.image, video=data.video, chat=data.chat)
    corpus = open_corpus(data, renderer)
    batches = [b for step in open_stream(data, corpus, renderer, seed=0, rank=0, size=1) for b in step.batches]
    tokens = max(int(units.tokens.max()) for units in corpus.sources)
    assert reach(corpus, renderer, enough=tokens) == Reach(positions=tokens, exact=False)
    farthest = reach(corpus, renderer, enough=1)
    assert farthest.positions == max(int(batch.positions[1:].max()) for batch in batches) + 1
    assert farthest.exact
    assert farthest.positions < tokens, "the sample of most tokens shows an image, which moves positions on by one side"


def test_check_derives_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "qwen3-vl-30b-a3b-lora", "context.yarn.factor=3"]) == 0
    printed = capsys.readouterr().out
    assert "yarn reaches position 262,144 x 3 = 786,432; config.json will say 786,432 tokens" in printed
    assert "0.1 ln 3 + 1 = 1.109861" in printed
    assert "--hf-overrides" in printed

"""The family table against the published files' hashes, and its counts against transformers' model on meta."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.architecture.families import Family, Rope, family, family_names
from finetune.architecture.family_problems import family_problems
from finetune.architecture.shapes import active_text_parameters, parameter_counts, parameter_shapes
from finetune.files.hubconfig import config_text, hub_config, read_family, to_hub_spelling
from finetune.files.jsonblock import load_json

TOTALS = {
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3-vl-30b-a3b": 31_070_754_032,
    "qwen3-vl-235b-a22b": 235_670_022_896,
}


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(name: str, block: str, **values: object) -> dict:
    """Return the family's hub config with some keys of a block replaced, or dropped if the value is None."""
    config = hub_config(family(name))
    part = config[block] | values
    config[block] = {key: value for key, value in part.items() if value is not None}
    return config


PUBLISHED = [name for name in family_names() if not name.startswith("tiny-")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_table_entry_gives_the_published_config_json_byte_for_byte(name):
    entry = family(name)
    text = config_text(hub_config(entry)).encode()
    assert hashlib.sha256(text).hexdigest() == entry.config_sha256
    assert family_problems(entry) == []


def test_the_32b_file_has_the_id_that_git_gave_the_published_one():
    text = config_text(hub_config(family("qwen3-vl-32b"))).encode()
    assert hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest() == "29e925092dee9f14278c53e7e7d876cea8a997bc"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals(name):
    assert parameter_counts(family(name)).total == TOTALS[name]


def test_parameter_counts_by_part():
    counts = parameter_counts(family("qwen3-vl-30b-a3b"))
    assert counts.experts == 28_991_029_248
    assert counts.attention == 905_981_952
    assert counts.router == 12_582_912
    assert counts.vision == 538_631_408
    assert counts.embeddings == counts.head == 311_164_928
    assert (counts.norms, counts.mlp) == (198_656, 0)
    large = parameter_counts(family("qwen3-vl-235b-a22b"))
    assert (large.experts, large.attention, large.router) == (227_096_395_776, 6_702_521_856, 49_283_072)
    assert (large.vision, large.head, large.norms) == (576_388_336, 622_329_856, 774_144)
    assert parameter_counts(family("qwen3-vl-2b")).head == 0
    assert active_text_parameters(family("qwen3-vl-30b-a3b")) == 3_353_032_704
    assert round(active_text_parameters(family("qwen3-vl-235b-a22b")) / 1e9, 2) == 22.19


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_match_transformers_model(name, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(write_config(tmp_path, hub_config(family(name))))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(family(name)) == expected
    assert sum(math.prod(shape) for shape in expected.values()) == TOTALS[name]


@pytest.mark.parametrize("name", family_names())
def test_both_spellings_of_config_json_read_back_as_the_table_entry(name, tmp_path):
    from transformers import AutoConfig

    hub = write_config(tmp_path / "hub", hub_config(family(name)))
    AutoConfig.from_pretrained(hub).save_pretrained(tmp_path / "v5")
    v5 = load_json(tmp_path / "v5" / "config.json")
    assert "rope_parameters" in v5["text_config"], "transformers 5 no longer writes its own spelling: adapt this test"
    assert read_family(hub) is family(name)
    assert read_family(tmp_path / "v5") is family(name)
    respelt = to_hub_spelling(v5)
    assert read_family(write_config(tmp_path / "back", respelt)) is family(name)
    wanted = hub_config(family(name))["text_config"]
    assert {key: respelt["text_config"][key] for key in wanted} == wanted
    assert "rope_parameters" not in respelt["text_config"]
    assert "num_local_experts" not in respelt["text_config"]
    assert respelt["vision_config"]["model_type"] == respelt["model_type"]


def test_a_custom_size_is_read_with_its_yarn(tmp_path):
    entry = family("qwen3-vl-30b-a3b")
    rope = Rope(type="yarn", factor=3.0, original_max_position_embeddings=262_144)
    own = replace(entry, name="mine", hub_id=None, config_sha256=None, text=replace(entry.text, rope=rope))
    read = read_family(write_config(tmp_path / "mine", hub_config(own)))
    assert read == own


def test_layers_without_experts_follow_transformers_rule():
    entry = family("qwen3-vl-30b-a3b")
    experts = replace(entry.text.experts, decoder_sparse_step=2, mlp_only_layers=(3,))
    mixed = replace(entry, text=replace(entry.text, num_hidden_layers=6, experts=experts))
    assert mixed.moe_layers == (1, 5)
    assert "model.language_model.layers.3.mlp.gate_proj.weight" in parameter_shapes(mixed)
    assert family("qwen3-vl-8b").moe_layers == ()


def test_attention_bias_adds_its_vectors():
    entry = family("qwen3-vl-2b")
    biased = replace(entry, text=replace(entry.text, attention_bias=True))
    extra = parameter_counts(biased).attention - parameter_counts(entry).attention
    assert extra == 28 * (2048 + 1024 + 1024 + 2048)


def test_hub_ids_and_editions_are_valid_names_too():
    assert family("Qwen/Qwen3-VL-235B-A22B-Thinking") is family("qwen3-vl-235b-a22b")
    assert family("Qwen/Qwen3-VL-4B-Instruct").name == "qwen3-vl-4b"


def test_unknown_family_suggests_the_nearest():
    with pytest.raises(
        ValueError, match=r"model.family: 'qwen3-vl-30b-a3' is not a known family; did you mean qwen3-vl-30b-a3b"
    ):
        family("qwen3-vl-30b-a3")
    with pytest.raises(ValueError, match="'llama' is not a known family; .* known families are qwen3-vl-2b"):
        family("llama")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config.json is missing"),
        ("{", r"config.json is not valid JSON"),
        ("[1]", r"must contain a JSON object, not a list"),
    ],
)
def test_unreadable_config_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_family(tmp_path)


MOE = "qwen3-vl-30b-a3b"
BAD_CONFIGS = [
    (changed(MOE, "text_config", hidden_size=None), r"config.json lacks text_config.hidden_size"),
    (changed(MOE, "text_config", num_experts=None), r"lacks text_config.num_experts \(or num_local_experts\)"),
    (changed(MOE, "text_config", rope_theta=None), r"lacks text_config.rope_theta"),
    (changed(MOE, "text_config", rope_scaling=None), r"lacks text_config.rope_scaling"),
    (changed(MOE, "text_config", head_dim=True), r"text_config.head_dim must be a whole number above 0, got True"),
    (changed(MOE, "text_config", rms_norm_eps="x"), r"rms_norm_eps must be a number, got 'x'"),
    (changed(MOE, "text_config", attention_bias=1), r"attention_bias must be true or false, got 1"),
    (changed(MOE, "text_config", hidden_act=1), r"hidden_act must be a string, got 1"),
    (changed(MOE, "text_config", bos_token_id=-1), r"bos_token_id must be a token id, got -1"),
    (changed(MOE, "text_config", mlp_only_layers=3), r"mlp_only_layers must be a list of whole numbers, got 3"),
    (changed(MOE, "text_config", num_attention_heads=30), r"30 is not a multiple of num_key_value_heads 4"),
    (changed(MOE, "text_config", head_dim=64), r"mrope_section \[24, 20, 20\] sums to 64, but half of text_config"),
    (changed(MOE, "text_config", num_experts_per_tok=129), r"129 must be between 1 and num_experts 128"),
    (changed(MOE, "vision_config", out_hidden_size=7), r"out_hidden_size 7 differs from text_config.hidden_size"),
    (
        changed(MOE, "vision_config", num_heads=7),
        r"vision_config.hidden_size 1152 is not a multiple of 4 x num_heads 7",
    ),
    (changed(MOE, "vision_config", num_position_embeddings=50), r"num_position_embeddings 50 is not a square"),
    (changed(MOE, "vision_config", deepstack_visual_indexes=[8, 27]), r"\[27\] are outside the tower's 27 blocks"),
    (changed(MOE, "text_config", num_hidden_layers=2), r"3 entries for 2 text layers"),
    (hub_config(family(MOE)) | {"model_type": "llava"}, r"model_type must be qwen3_vl or qwen3_vl_moe, got 'llava'"),
    (hub_config(family(MOE)) | {"text_config": [1]}, r"text_config must be an object, got \[1\]"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_a_bad_config_names_its_file_and_key(tmp_path, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_family(write_config(tmp_path, config))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, r"rope_type must be default or yarn, got 'linear'"),
        ({"rope_type": "yarn", "factor": 2.0}, r"yarn needs factor and original_max_position_embeddings"),
        ({"attn_factor": 2.0}, r"text_config.rope_scaling.attn_factor would be ignored"),
    ],
)
def test_a_bad_rope_is_named(tmp_path, rope, message):
    scaling = hub_config(family(MOE))["text_config"]["rope_scaling"] | rope
    with pytest.raises(ValueError, match=message):
        read_family(write_config(tmp_path, changed(MOE, "text_config", rope_scaling=scaling)))


def test_the_table_loads_no_torch():
    modules = "finetune.architecture.families, finetune.architecture.shapes, finetune.files.hubconfig"
    code = f"import {modules}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_family_is_hashable_and_frozen():
    entry: Family = family(MOE)
    assert hash(entry) == hash(replace(entry))
    with pytest.raises(AttributeError):
        entry.name = "other"

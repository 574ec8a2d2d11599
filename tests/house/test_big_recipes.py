"""Recipes that no test machine can run: their engine configuration, and the model that they build on meta."""

import json
from pathlib import Path

import places
import pytest
import torch

from finetune.architecture.shapes import parameter_counts, parameter_shapes
from finetune.files.hubconfig import config_text, hub_config
from finetune.model.build import build
from finetune.model.lora import trainable_table
from finetune.ranks.engine import engine_config
from finetune.settings.checks import base_family
from finetune.settings.recipes import load_recipe
from finetune.settings.stages import run_stages
from finetune.training.setup import engine_options, model_options

GOLDEN = places.GOLDEN / "big_recipes.json"
NAMES = ("qwen3-vl-30b-a3b-long", "qwen3-vl-235b-a22b-lora")


def engine_configs() -> dict[str, object]:
    return {name: engine_config(engine_options(load_recipe(name)[0])) for name in NAMES}


def test_the_engine_gets_the_golden_dictionaries() -> None:
    # To renew: PYTHONPATH=.:tests/harness python -c \
    #   'from tests.house.test_big_recipes import *; GOLDEN.write_text(json.dumps(engine_configs(), indent=2) + "\n")'
    assert engine_configs() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_built_on_meta_with_every_published_shape(name: str, tmp_path: Path) -> None:
    # one process is one rank with all experts; `moetune check` checks the layout of ranks
    config, _ = load_recipe(name, ["parallel.ep=1", "parallel.resident=none", "context.yarn.factor=3"])
    base = base_family(config)
    (tmp_path / "config.json").write_text(config_text(hub_config(base)))
    empty = build(tmp_path, model_options(config, base, torch.device("cpu"), lambda _: None))
    assert dict(empty.expected) == parameter_shapes(base)
    assert all(tensor.is_meta for tensor in empty.module.parameters())
    rows = {row.part: row for row in trainable_table(empty)}
    text, experts = base.text, base.text.experts
    assert experts is not None
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    wide = text.num_attention_heads * text.head_dim
    attention = sum(16 * (text.hidden_size + n * text.head_dim) for n in heads) + 16 * (wide + text.hidden_size)
    assert rows["attention"].trained == attention * text.num_hidden_layers
    each = text.hidden_size + 2 * experts.moe_intermediate_size + experts.moe_intermediate_size + text.hidden_size
    assert rows["experts"].trained == 8 * each * experts.num_experts * text.num_hidden_layers
    assert sum(row.total for row in rows.values()) == parameter_counts(base).total
    rope = empty.module.config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 3.0, 5_000_000)


def test_every_stage_of_the_long_recipe_has_the_same_tokens_per_step() -> None:
    stages = run_stages(load_recipe(NAMES[0])[0])
    assert [(stage.data.tokens_per_pack, stage.sp) for stage in stages] == [(8192, 1), (32768, 4), (262_144, 8)]
    assert {stage.data.tokens_per_pack * stage.data.packs_per_step for stage in stages} == {524_288}

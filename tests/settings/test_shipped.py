"""Tests of the shipped recipes: their first lines, and the fit on the hardware that each names."""

import re
from pathlib import Path

import pytest

from finetune.planner.gpus import cluster
from finetune.planner.plan import plan
from finetune.settings.checks import base_family, cross_check
from finetune.settings.recipes import find_recipe, load_recipe, recipe_names
from finetune.settings.schema import editor_line, schema_file
from finetune.settings.shipped import Shipped, shipped_recipes
from launchers.cli import main

RECIPES = shipped_recipes()
IDS = [recipe.name for recipe in RECIPES]
MIXED = {"tokens", "samples"}


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_a_recipe_causes_no_warning_on_the_hardware_that_it_names(recipe: Shipped) -> None:
    config, problems = load_recipe(recipe.name)
    assert [str(wrong) for wrong in [*problems, *cross_check(config, ranks=recipe.devices)]] == []


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.device != "cpu"], ids=lambda it: it.name)
def test_a_recipe_fits_the_hardware_that_it_names(recipe: Shipped) -> None:
    config, _ = load_recipe(recipe.name)
    machines = cluster(recipe.device, gpus=recipe.devices, per_node=None, price=None)
    planned = plan(config, base_family(config), machines)
    assert planned.fits, f"{-planned.margin / 1e9:.1f} GB are missing"


@pytest.mark.parametrize("name", IDS)
def test_the_weights_of_a_mixture_add_up_to_1(name: str) -> None:
    """An inherited source would have a weight of 1, in addition to shares that add up to 1."""
    data = load_recipe(name)[0].data
    if data.mixture in MIXED:
        assert sum(source.weight for source in data.sources.values()) == pytest.approx(1)


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(IDS)]] == recipe_names()
    assert re.match("documents +8 x h100-80gb +Documents, forms, tables", lines[IDS.index("documents")])
    assert " 16 x h100-80gb  " in lines[IDS.index("qwen3-vl-30b-a3b-full")]
    assert main(["recipes", "documents"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == editor_line(str(schema_file())), "a copy in any folder finds the schema"
    assert rest == find_recipe("documents").read_text().splitlines()[1:]
    assert main(["recipes", "document"]) == 2
    assert "'document' is not a shipped recipe. Shipped: documents, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "warned"),
    [
        ("{vision_blocks: {mode: frozen}}", [], []),
        ("{vision_blocks: {mode: frozen, r: 4}}", [], ["adapters.vision_blocks.r"]),
        ("{vision_blocks: {mode: frozen}}", ["adapters.vision_blocks.r=4"], ["adapters.vision_blocks.r"]),
        ("{attention: {r: 4}}", ["adapters.attention.mode=full"], []),
        ("{}", ["adapters.attention.r=4", "adapters.attention.mode=full"], ["adapters.attention.r"]),
    ],
)
def test_freezing_a_part_warns_only_about_numbers_that_its_recipe_sets(
    tmp_path: Path, text: str, words: list[str], warned: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: tiny-cpu\nadapters: {text}\n")
    config, problems = load_recipe(str(tmp_path / "mine.yaml"), words)
    assert problems == []
    assert [wrong.key for wrong in cross_check(config, ranks=2)] == warned


def test_a_frozen_part_that_trains_again_keeps_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: tiny-cpu\nadapters: {vision_blocks: {mode: frozen}}\n")
    config, _ = load_recipe(str(tmp_path / "mine.yaml"), ["adapters.vision_blocks.mode=lora"])
    assert config.adapters.vision_blocks.r == 8

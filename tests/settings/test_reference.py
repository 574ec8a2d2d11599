"""Tests of the reference of keys: it is complete and consistent, and every file made from it is current."""

import json
import re
from typing import Any, Literal, get_args, get_origin

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf
from places import ROOT

from finetune.config import RunConfig
from finetune.settings.recipes import effective, find_recipe, load_recipe, recipe_names
from finetune.settings.reference import Key, Section, find, keys, sections
from finetune.settings.schema import editor_line, recipe_schema, schema_file
from finetune.settings.typed import leaves
from launchers.cli import main
from launchers.reference import pages

KEYS = keys()


def test_every_key_is_listed_with_its_default_as_written_in_a_recipe() -> None:
    here = {name: key.default for name, key in KEYS.items() if "<" not in name}
    assert set(here) == {name for name in leaves(effective(RunConfig()))} | {"engine.extra"}
    written = load_recipe("", [f"{name}={default}" for name, default in here.items()])
    assert written == load_recipe("")


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_key_is_explained(key: Key) -> None:
    assert key.meaning.endswith(".")
    assert key.change.endswith(".")
    literals = [hint for hint in (key.hint, *get_args(key.hint)) if get_origin(hint) is Literal]
    values = [value for hint in literals for value in get_args(hint)]
    refers = "which explains the other values" in key.meaning
    assert refers or not [value for value in values if f"`{value}`" not in key.meaning]
    if type(None) in get_args(key.hint):
        assert "`null`: " in key.meaning
    if key.default == '""':
        assert "Empty: " in key.meaning or key.dotted == "model.path"


def test_keys_named_in_explanations_exist() -> None:
    tops = {section.dotted.split(".")[0] for section in sections()}
    texts = {name: f"{key.meaning} {key.change} {key.related}" for name, key in KEYS.items()}
    named = {(name, word.split("=")[0]) for name, text in texts.items() for word in re.findall(r"`([\w.<>=]+)`", text)}
    dotted = {(name, word) for name, word in named if word.split(".")[0] in tops and "." in word}
    assert len(dotted) > 100
    assert not {(name, word) for name, word in dotted if find(word) is None}


def test_a_name_chosen_by_the_user_finds_its_key() -> None:
    for asked in ("data.sources.charts.weight", "data.sources.<name>.weight"):
        found = find(asked)
        assert isinstance(found, Key)
        assert found.dotted == "data.sources.<name>.weight"
    assert isinstance(find("eval.sources"), Section)
    assert isinstance(find("stages.first.data"), Section)
    assert find("data.sources.charts.weigth") is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["data.mixture"],
            r"^data.mixture: one of natural, tokens, samples; default natural\n(?s:.*)`samples`: they are",
        ),
        (["adapters.experts.r"], r"default 8\n(?s:.*)each expert"),
        (["eval.sources.held.path"], r"it must be set"),
        (["overlong"], r"  data.overlong\n  stages.<name>.data.overlong"),
        (["z_coefficient"], r"^moe.z_coefficient: a number; default 0"),
        (["parallel"], r"parallel.recompute +The activations that decoder layers recompute"),
        ([], r"stages.<name> +Changes from a given step on"),
        (["--schema"], re.escape(editor_line(str(schema_file())))),
    ],
)
def test_explain(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *words]) == 0
    assert re.search(text, capsys.readouterr().out)


def test_explain_suggests_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "data.mixtur"]) == 2
    assert "'data.mixtur' is neither a key nor a section. Did you mean `data.mixture`." in capsys.readouterr().err


@pytest.mark.parametrize("path", pages())
def test_generated_files_are_current(path: str) -> None:
    assert (ROOT / path).read_text() == pages()[path], "run: python -m launchers.reference"


def test_links_of_the_page_of_keys_are_valid() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    anchors = {re.sub(r"[^\w-]", "", heading.lower()) for heading in re.findall(r"^#+ `?(.+?)`?$", page, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert len(links) > 80
    assert links <= anchors


def test_every_argument_of_every_command_is_explained() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    arguments = re.findall(r"^- `([^`]+)`:(.*)$", page, re.MULTILINE)
    assert len(arguments) > 150
    assert not [name for name, text in arguments if len(text.split()) < 2]


def _wrong(recipe: Any) -> list[str]:
    return [error.json_path for error in Draft7Validator(recipe_schema()).iter_errors(recipe)]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_match_the_schema_that_they_name(name: str) -> None:
    Draft7Validator.check_schema(recipe_schema())
    path = find_recipe(name)
    assert path.read_text().splitlines()[0] == editor_line(schema_file().name)
    assert schema_file().parent == path.parent
    assert _wrong(OmegaConf.to_container(OmegaConf.load(path))) == []


def test_the_schema_rejects_wrong_recipes() -> None:
    wrong = {
        "optim": {"lr": "fast", "wd": 1},
        "data": {"mixture": "token", "sources": {"a": {"weight": True}, "b": {"pth": "x"}}},
        "parallel": {"ep": "many"},
    }
    assert set(_wrong(wrong)) == {
        *("$.optim.lr", "$.optim", "$.data.mixture", "$.data.sources.a.weight", "$.data.sources.b", "$.parallel.ep"),
    }


def test_the_schema_accepts_valid_recipes() -> None:
    fine = """
        base: tiny-cpu
        optim:
        parallel: {ep: auto, sp: '${parallel.tile_tokens}'}
        data: {image: {max_tokens: null}, sources: {a: {path: '???', weight: 2}}}
        track: {wandb: off, tags: [a, b]}
        stages: {one: {train: [merger], data: {weights: {a: 3}}}}
        engine: {extra: {comms_logger: {enabled: true}}}
        """
    assert _wrong(OmegaConf.to_container(OmegaConf.create(fine), resolve=False)) == []
    assert json.loads(schema_file().read_text())["additionalProperties"] is False

"""Tests of the configuration: precedence of its layers, and the errors that users can make."""

import re
from pathlib import Path

import pytest

from finetune.config import RunConfig, RunSectionConfig
from finetune.settings.checks import cross_check, require
from finetune.settings.derive import derive
from finetune.settings.problems import ConfigError, Problem
from finetune.settings.recipes import decoded_words, effective, encoded_words, find_recipe, load_recipe, recipe_names
from finetune.settings.typed import leaves


def _write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def _problems(name: str, *overrides: str, ranks: int | None = None) -> dict[str, Problem]:
    config, problems = load_recipe(name, overrides)
    problems += cross_check(config, ranks=ranks, known=[problem.key for problem in problems])
    assert len({problem.key for problem in problems}) == len(problems), problems
    return {problem.key: problem for problem in problems}


def test_each_layer_wins_over_the_one_below(tmp_path: Path) -> None:
    _write(tmp_path, "ground.yaml", "optim: {lr: 0.1}\ndata: {packs_per_step: 6, tokens_per_pack: 60}\n")
    _write(tmp_path, "middle.yaml", "base: ground.yaml\ndata: {packs_per_step: 7}\n")
    top = _write(tmp_path, "top.yaml", "base: middle.yaml\nrun: {seed: 3}\n")
    config, problems = load_recipe(top, ["data.tokens_per_pack=70"])
    assert problems == []
    assert (config.optim.lr, config.data.packs_per_step, config.data.tokens_per_pack) == (0.1, 7, 70)
    assert (config.run.seed, config.parallel.ep) == (3, RunConfig().parallel.ep)


def test_a_recipe_builds_on_a_shipped_one_by_name(tmp_path: Path) -> None:
    mine = _write(tmp_path, "mine.yaml", "base: tiny-cpu\ndata: {sources: {own: {path: a, weight: 3}}}\n")
    config, problems = load_recipe(mine)
    assert problems == []
    assert set(config.data.sources) == {"general", "own"}
    assert config.data.packs_per_step == load_recipe("tiny-cpu")[0].data.packs_per_step


def test_overrides_can_set_sources_by_name() -> None:
    config, problems = load_recipe(
        "tiny-cpu", ["data.sources.general.weight=0.3", "data.sources.extra.path=/x/{0..3}.tar"]
    )
    assert problems == []
    assert config.data.sources["general"].weight == 0.3
    assert config.data.sources["extra"].path == "/x/{0..3}.tar"


def test_values_may_refer_to_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR_OF_TEST", "0.25")
    mine = _write(
        tmp_path, "a.yaml", "base: tiny-cpu\noptim: {lr: '${oc.env:LR_OF_TEST}'}\nrun: {seed: '${parallel.ep}'}\n"
    )
    config, problems = load_recipe(mine)
    assert problems == []
    assert (config.optim.lr, config.run.seed) == (0.25, 2)


def test_a_later_layer_corrects_an_earlier_one(tmp_path: Path) -> None:
    mine = _write(tmp_path, "a.yaml", "base: tiny-cpu\noptim: {lr: abc}\nrun: {seed: '???'}\n")
    assert load_recipe(mine, ["optim.lr=0.5", "run.seed=4"])[1] == []
    assert {problem.key for problem in load_recipe(mine)[1]} == {"optim.lr", "run.seed"}


@pytest.mark.parametrize(
    ("override", "key", "text"),
    [
        ("optim.lr=abc", "optim.lr", r"it must be a number"),
        ("optim.lr=true", "optim.lr", r"it must be a number"),
        ("optim.lr=nan", "optim.lr", r"a finite number above 0"),
        ("optim.lr=0", "optim.lr", r"a finite number above 0"),
        ("data.packs_per_step=8.0", "data.packs_per_step", r"it must be a whole number"),
        ("data.packs_per_step=", "data.packs_per_step", r"it must be a whole number"),
        ("data.packs_per_step=0", "data.packs_per_step", r"it must be at least 1.*data.packs_per_step=1 or more"),
        ("data.tokens_per_pack=-1", "data.tokens_per_pack", r"it must be at least 1"),
        ("data.tokens_per_pack=[1, 2]", "data.tokens_per_pack", r"it must be a whole number"),
        ("data.prefetch=0", "data.prefetch", r"it must be at least 1.*data.prefetch=1 or more"),
        ("data.sources.general.weight=2", "data.sources.general.weight", r"no effect with data.mixture=natural"),
        ("run.seed=-1", "run.seed", r"it must be at least 0"),
        ("parallel.ep=0", "parallel.ep", r"it must be at least 1"),
        ("data.sourcez=[]", "data.sourcez", r"no such key.*Did you mean `data.sources`"),
        ("data.sources=[a]", "data.sources", r"it must hold entries by name.*data.sources.<name>.<key>"),
        ("data.sources.a b.path=x", "data.sources.a b", r"letters, digits"),
        ("data.sources.new.weight=1", "data.sources.new.path", r"it must be set. Add data.sources.new.path=..."),
        ("data.sources.general.weight=0", "data.sources.general.weight", r"a finite number above 0"),
        (
            "data.sources.general=x",
            "data.sources.general",
            r"it must be a section, with the keys: path, max_tokens, map, config, split, weight",
        ),
        ("data=5", "data", r"it must be a section, with the keys: packs_per_step"),
        ("dat.packs_per_step=4", "dat", r"no such key.*Did you mean `data`"),
        ("objective.kind=sft", "objective.kind", r"no such key. Remove it: objective has no keys yet"),
        ("base=tiny-cpu", "base", r"no such key"),
        ("optim.lr", "optim.lr", r"an override must have the form section.key=value"),
        ("optim..lr=3", "optim..lr=3", r"an override must have the form section.key=value"),
        ("optim.lr=[1", "optim.lr", r"not valid YAML"),
        ("run.seed=${no.such}", "run.seed", r"cannot be resolved.*\$\{\.\.\.\}"),
        ("optim.lr=${data.sources}", "optim.lr", r"cannot be resolved"),
        ("run.seed=???", "run.seed", r"it must be set"),
        ("model.family=qwen3-vl-30b-a3x", "model.family", r"Did you mean `qwen3-vl-30b-a3b`"),
        ("checkpoint.resume=", "checkpoint.resume", r"it must be text"),
        ("model.family=''", "model.path", r"a folder with a config.json, unless .*Set model.family \(.*tiny-moe"),
        ("data.tokens_per_pack=999999999", "data.tokens_per_pack", r"longer than the context of tiny-moe, 4,096"),
    ],
)
def test_errors_name_the_wrong_value_the_allowed_ones_and_a_remedy(override: str, key: str, text: str) -> None:
    problems = _problems("tiny-cpu", override)
    assert list(problems) == [key]
    with pytest.raises(ConfigError, match=text):
        raise ConfigError([problems[key]] if problems[key].level == "error" else [_as_error(problems[key])])


def _as_error(problem: Problem) -> Problem:
    assert problem.key == "data.tokens_per_pack", "this is the only warning"
    return Problem(key=problem.key, found=problem.found, allowed=problem.allowed, remedy=problem.remedy)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    mine = _write(
        tmp_path, "mine.yaml", "optim: {lr: x, wd: 1}\nnonsense: {}\ndata: {sources: {a: {path: [1]}, b: 7}}\n"
    )
    problems = _problems(mine, "run.seed=no", "parallel.ep=0")
    assert set(problems) == {
        *("optim.lr", "optim.wd", "nonsense", "data.sources.a.path", "data.sources.b", "run.seed", "parallel.ep"),
        "model.path",
    }
    assert (problems["optim.lr"].source, problems["run.seed"].source) == ("mine.yaml", "command line")


def test_packs_must_be_divisible_by_the_ranks_and_the_nearest_are_named() -> None:
    assert "data.packs_per_step=6 or data.packs_per_step=12" in str(
        _problems("tiny-cpu", "parallel.ep=1", ranks=6)["data.packs_per_step"]
    )
    assert _problems("tiny-cpu", ranks=8) == {}
    fewer = _problems("tiny-cpu", "data.packs_per_step=2", ranks=8)["data.packs_per_step"]
    assert str(fewer).endswith("Use data.packs_per_step=8.")


def test_expert_groups_must_divide_the_ranks() -> None:
    six = _problems("tiny-cpu", "parallel.ep=4", "data.packs_per_step=6", ranks=6)["parallel.ep"]
    assert (six.allowed, six.remedy) == (
        "it must divide the number of ranks, 6",
        "Set parallel.ep to one of 1, 2, 3, 6, or start 8 ranks (--ranks 8)",
    )
    alone = _problems("tiny-cpu", "parallel.ep=2", ranks=1)["parallel.ep"]
    assert str(alone).endswith("ranks, 1. Set parallel.ep=1, or start 2 ranks (--ranks 2).")
    experts = _problems("tiny-cpu", "parallel.ep=5", "data.packs_per_step=5")["parallel.ep"]
    assert re.search(r"must divide the \d+ experts of tiny-moe. Use one of 1, 2, ", str(experts))
    dense = _problems("tiny-cpu", "model.family=qwen3-vl-8b", ranks=4)["parallel.ep"]
    assert "qwen3-vl-8b is dense" in str(dense)


def test_no_sources_is_a_problem(tmp_path: Path) -> None:
    mine = _write(tmp_path, "mine.yaml", "model: {family: tiny-moe}\n")
    assert "nothing to train on" in str(_problems(mine)["data.sources"])


def test_a_key_written_with_dots_in_yaml_is_explained(tmp_path: Path) -> None:
    mine = _write(tmp_path, "mine.yaml", "base: tiny-cpu\noptim.lr: 3\n")
    assert "a dot separates sections only on the command line" in str(_problems(mine)["optim.lr"])


def test_null_unsets_texts_only() -> None:
    config, problems = load_recipe("tiny-cpu", ["model.family=null", "optim.lr=null", "checkpoint.resume=null"])
    assert config.model.family == ""
    assert [problem.key for problem in problems] == ["optim.lr", "checkpoint.resume"]


def test_the_folder_of_a_run_is_below_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_recipe("tiny-cpu")[0].run.path == Path("runs/tiny-cpu")
    assert load_recipe("tiny-cpu", ["run.folder=~/a", "run.name=b"])[0].run.path == Path("/home/me/a/b")
    assert "one line of printable" in _problems("tiny-cpu", 'run.folder="a\\nb"')["run.folder"].allowed


def test_a_folder_and_a_family_must_agree(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    problems = _problems("tiny-cpu", f"model.path={tmp_path}")
    assert "config.json" in str(problems["model.path"])


def test_require_raises_one_error_with_all_problems() -> None:
    config, problems = load_recipe("tiny-cpu", ["optim.lr=abc", "data.sourcez=[]", "data.packs_per_step=5"])
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*optim.lr.*data.sourcez.*data.packs_per_step = 5"):
        require(config, problems, ranks=2)
    config, problems = load_recipe("tiny-cpu")
    assert require(config, problems, ranks=2) == []


def test_a_resumed_run_may_have_fewer_ranks() -> None:
    config, problems = load_recipe("tiny-cpu", ["parallel.ep=1"])
    with pytest.raises(ConfigError, match=r"data.packs_per_step = 8.*must be divisible by the 3 data ranks"):
        require(config, problems, ranks=3)
    (warned,) = require(config, problems, ranks=3, resuming=True)
    assert "2 of 3 data ranks take 3 packs per step, the others 2 and an empty one" in str(warned)
    shown = {number.name: number for number in derive(config, ranks=3)}
    assert shown["micro_batches_per_rank"].value == 3
    assert "(1 of them empty)" in shown["micro_batches_per_rank"].text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tiny-cpuu", r"neither a file .* nor a shipped recipe. Did you mean `tiny-cpu`"),
        ("configs/nope.yaml", r"nope.yaml does not exist. Shipped recipes: .*tiny-cpu"),
        ("elsewhere/tiny-cpu.yaml", r"`tiny-cpu` alone names the shipped recipe"),
    ],
)
def test_a_missing_recipe_is_an_error(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        find_recipe(name)


@pytest.mark.parametrize("text", ["a: [1\n", "a: 1\na: 2\n", "\x00", "5\n"])
def test_a_file_that_is_not_yaml_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"recipe .*bad.yaml: not readable as YAML"):
        load_recipe(_write(tmp_path, "bad.yaml", text))


def test_a_list_at_the_top_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it must hold sections with keys, found a list"):
        load_recipe(_write(tmp_path, "bad.yaml", "- 1\n"))


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    for name, text in (("empty", ""), ("half", "optim:\n")):
        defaults = RunConfig(run=RunSectionConfig(name=name))
        assert load_recipe(_write(tmp_path, f"{name}.yaml", text)) == (defaults, [])


def test_a_run_without_a_name_is_named_after_its_recipe_file(tmp_path: Path) -> None:
    """The name is not that of the base recipe, and is the same at each start, so that a run can resume."""
    mine = _write(tmp_path, "charts-2.yaml", "base: tiny-cpu\n")
    names = [load_recipe(name, words)[0].run.name for name in (mine, "tiny-cpu") for words in ([], ["run.name="])]
    assert names == ["charts-2", "charts-2", "tiny-cpu", "tiny-cpu"]
    assert load_recipe(mine, ["run.name=other"])[0].run.name == "other"


def test_a_broken_base_line_is_named(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", "base: b.yaml\n")
    circle = _problems(_write(tmp_path, "b.yaml", "base: a.yaml\nmodel: {family: tiny-moe}\n"))
    assert "in a circle: b.yaml -> a.yaml -> b.yaml" in str(circle["base"])
    missing = _problems(_write(tmp_path, "c.yaml", "base: nope\n"))
    assert "neither a file" in str(missing["base"])


def test_leaves_flatten_the_effective_configuration() -> None:
    config, _ = load_recipe("tiny-cpu")
    flat = leaves(effective(config))
    assert flat["data.sources.general.path"] == "shards/general"
    assert flat["optim.lr"] == config.optim.lr
    assert "tiny-cpu" in recipe_names()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.general.path=${oc.env:NOPE}", r"it cannot be resolved: .*'NOPE' not found"),
        ("track.tags=wandb", "track.tags = 'wandb' .*it must be a list, each text"),
        (f"optim.lr={'9' * 400}", "optim.lr = 9+.* it must be a number"),
    ],
)
def test_unreadable_values_are_problems(override: str, message: str) -> None:
    _, problems = load_recipe("tiny-cpu", [override])
    assert any(re.search(message, str(problem)) for problem in problems), problems


def test_encoded_words_can_be_decoded() -> None:
    words = ["r", 'a=it\'s "x" $HOME', "b=一"]
    assert decoded_words(encoded_words(words)) == words
    with pytest.raises(ValueError, match="--words: '!' is not text that `moetune launch` wrote"):
        decoded_words("!")

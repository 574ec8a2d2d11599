"""Tests of `moetune init`: recipes for data, base and GPUs, and messages about wrong input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write_shards
from places import ROOT

from data.prepare.found import UserData, find_data, hold_out
from data.shards.find import find_shards
from finetune.architecture.families import family
from finetune.files.hubconfig import config_text, hub_config
from finetune.planner.gpus import cluster
from finetune.planner.plan import plan
from finetune.settings.checks import base_family, cross_check
from finetune.settings.recipes import load_recipe
from finetune.settings.starter import GOALS, WHY, Facts, config_of, starter
from finetune.settings.typed import leaves
from launchers.cli import main
from launchers.init import _layout

MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"


def _rows(folder: Path, count: int = 60, name: str = "rows.jsonl") -> Path:
    """Write rows of which each two share an image."""
    folder.mkdir(exist_ok=True)
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A circle."}]
    rows = [{"id": str(at), "image": f"images/{at // 2}.png", "conversations": turns} for at in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def _read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_folder_of_rows_becomes_a_recipe_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = _read(str(_rows(Path("mine"))))
    words = ["init", "--data", "mine", "--model", MODEL, "--gpus", "8"]
    code = (
        "import sys; from launchers.cli import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"})
    text = Path("my-recipe.yaml").read_text()
    assert [line for line in text.splitlines() if re.match(r" +\S+: \S", line) and " # " not in line] == []
    config, problems = load_recipe("my-recipe.yaml")
    assert [*problems, *cross_check(config, ranks=8)] == []
    assert plan(config, base_family(config), cluster("h100-80gb", gpus=8, per_node=None, price=None)).fits
    assert main(["plan", "my-recipe.yaml", "--gpus", "8", "--gpu", "h100-80gb", "--fit", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["fit"]["proposals"][0]["changes"]
    assert not {"parallel.ep", "parallel.sp", "parallel.recompute"} & best.keys()  # the recipe has the proposed values
    assert (config.schedule.epochs, config.data.packs_per_step, config.data.remainder) == (2, 8, "keep")
    train, held = (_read(source.path) for source in (config.data.sources["train"], config.eval.sources["held-out"]))
    assert sorted(row["id"] for row in train + held) == sorted(row["id"] for row in rows)
    assert not {row["image"] for row in train} & {row["image"] for row in held}
    assert main(words) == 2
    assert "--out: my-recipe.yaml is there already; name another file" in capsys.readouterr().err
    assert Path("my-recipe.yaml").read_text() == text
    assert main([*words, "--out", "other.yaml"]) == 0  # holds out the same rows
    printed = capsys.readouterr().out
    assert "held out, in mine/rows.held-out.jsonl; rows that share media or `group` stay together" in printed
    assert printed.splitlines()[-1] == "next: moetune train other.yaml --ranks 8"
    (tmp_path / "mine" / "rows.held-out.jsonl").write_text("{}\n")
    assert main([*words, "--out", "third.yaml"]) == 2
    assert "mine/rows.held-out.jsonl is there already, with other rows" in capsys.readouterr().err
    assert not Path("third.yaml").exists()


def test_a_toy_base_in_a_folder_is_not_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/config.json").write_text(config_text(hub_config(family("tiny-moe"))))
    assert main(["init", "--data", str(_rows(tmp_path, 3)), "--model", "base", "--gpus", "2", "--out", "a.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "evaluation: none is held out of 3 rows: name others in eval.sources" in printed
    config, _ = load_recipe("a.yaml")
    assert (config.model.path, config.data.tokens_per_pack, config.eval.sources) == ("base", 512, {})
    assert main(["init", "--data", "rows.jsonl", "--model", MODEL, "--gpus", "16", "--out", "b.yaml"]) == 0
    assert "next: moetune launch b.yaml --on PROFILE.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("goal", "model", "gpus", "gpu"),
    [
        *((goal, "qwen3-vl-30b-a3b", 8, "h100-80gb") for goal in GOALS if goal != "full"),
        ("full", "qwen3-vl-30b-a3b", 16, "h100-80gb"),
        ("general", "qwen3-vl-235b-a22b", 64, "h100-80gb"),
        ("general", "qwen3-vl-30b-a3b", 1, "h200-141gb"),
        ("documents", "qwen3-vl-8b", 6, "a100-80gb"),
        ("full", "qwen3-vl-4b", 8, "h100-80gb"),
        ("router", "qwen3-vl-4b", 3, "h100-80gb"),
    ],
)
def test_recipes_of_all_goals_fit_their_hardware_without_warnings(goal: str, model: str, gpus: int, gpu: str) -> None:
    base, machines = family(model), cluster(gpu, gpus=gpus, per_node=None, price=None)
    data = UserData(train="rows.jsonl", held_out="held.jsonl", samples=None)
    tree = starter(Facts(goal=goal, model=f"Qwen/{model}", family=model, gpus=gpus, data=data), base)
    layout, _ = _layout(tree, base, machines)
    tree["parallel"] |= layout
    config = config_of(tree)
    assert [str(wrong) for wrong in cross_check(config, ranks=gpus)] == []
    assert plan(config, base, machines).fits
    inline = ("adapters", "data.sources", "eval.sources")
    keys = {re.sub(rf"^({'|'.join(inline)})\.([\w-]+)\..*", r"\1.\2", key) for key in leaves(tree)}
    assert keys <= WHY.keys()


def test_rows_per_step_depend_on_the_data() -> None:
    def packs(samples: int | None, gpus: int = 8) -> int:
        data = UserData(train="rows.jsonl", samples=samples)
        facts = Facts(goal="general", model=MODEL, family="qwen3-vl-30b-a3b", gpus=gpus, data=data)
        packs: int = starter(facts, family("qwen3-vl-30b-a3b"))["data"]["packs_per_step"]
        return packs

    assert [packs(None), packs(None, 1), packs(None, 6), packs(None, 64)] == [32, 8, 36, 64]
    assert [packs(100), packs(3000), packs(100_000)] == [8, 24, 32]


def test_shards_become_sources_and_the_last_of_many_is_held_out(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "many", count=12, per_shard=1)
    data = hold_out(find_data(tmp_path / "many"))
    assert data.train == f"{tmp_path}/many/part-{{000..010}}.tar"
    assert (find_shards(data.train, "x"), data.held_out, data.samples) == (shards[:-1], str(shards[-1]), 12)
    shards[5].rename(tmp_path / "many" / "part-odd.tar")
    data = hold_out(find_data(tmp_path / "many"))
    assert {*find_shards(data.train, "x"), Path(data.held_out)} == set((tmp_path / "many").glob("*.tar"))
    write_shards(tmp_path / "few", count=4, per_shard=2)
    data = hold_out(find_data(tmp_path / "few"))
    assert (data.train, data.held_out) == (str(tmp_path / "few"), "")
    assert "none is held out: `moetune shards split` parts so few shards" in data.how


def test_a_file_of_held_out_rows_next_to_the_training_rows_is_used(tmp_path: Path) -> None:
    train, held = _rows(tmp_path, name="train.jsonl"), _rows(tmp_path, 4, name="val.jsonl")
    data = hold_out(find_data(tmp_path))
    assert (data.train, data.held_out, data.samples) == (str(train), str(held), 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "val.jsonl"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "contains no shards (.tar), no file of rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .zip) and no"),
        ({"a/1.PNG": b"", "a/2.jpg": b""}, "holds 2 images, but no file that says what to answer. Write "),
        ({"a.jsonl": b"{}", "b.json": b"[]"}, "contains several files of rows (a.jsonl, b.json): name the one"),
        ({"a.jsonl": b""}, "a.jsonl contains no row"),
        ({"a.jsonl": b'{"prompt": "x"}\n'}, "a.jsonl, row 1: "),
        ({"a.jsonl": b'{"prompt": \n'}, "`moetune shards build "),
        ({"a.tar": b"\0" * 10240}, "a.tar contains no sample"),
        ({"a.tar": b"x"}, "`moetune shards check "),
    ],
)
def test_data_that_cannot_be_a_source_is_explained(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_data(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": "none"}, "--data: there is no none"),
        ({"data": "table.xlsx"}, "--data: table.xlsx is neither a tar of samples nor a file of rows"),
        ({"model": "./base"}, "--model: there is no base/config.json. Give the folder of a base, or a hub id"),
        ({"model": "Qwen/Qwen3-VL-31B"}, "--model: the folder Qwen/Qwen3-VL-31B does not exist, and as a hub id: "),
        ({"gpus": "none"}, "--gpus must be a whole number from 1, found 'none'"),
        ({"gpus": "1", "gpu": "a100-40gb"}, "--gpus, --gpu: this does not fit 1 x a100-40gb. The smallest change"),
        ({"goal": "chess"}, "--goal is 'chess'; it must be one of general, documents"),
        ({"out": "mine"}, "--out is 'mine'; the name of a recipe ends in .yaml"),
        ({"data": "", "gpus": ""}, "--data, --gpus must be given where there is no terminal to ask on"),
    ],
)
def test_a_wrong_flag_is_named_and_no_file_is_written(
    tmp_path: Path,
    flags: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _rows(tmp_path)
    Path("table.xlsx").touch()
    given = {"data": "rows.jsonl", "model": MODEL, "gpus": "8"} | flags
    assert main(["init", *(word for name, value in given.items() if value for word in (f"--{name}", value))]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "table.xlsx"]


def test_init_asks_five_questions_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _rows(tmp_path, name="train.jsonl")
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return {2: "4", 4: "documents"}.get(len(asked) - 1, "")

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    assert main(["init"]) == 0
    assert len(asked) == 5
    assert "[train.jsonl]" in asked[0]
    config, _ = load_recipe("my-recipe.yaml")
    assert (config.model.family, config.data.image.max_tokens) == ("qwen3-vl-30b-a3b", 4096)
    assert "next: moetune train my-recipe.yaml --ranks 4" in capsys.readouterr().out
    asked.clear()
    assert main(["init", "--data", "train.jsonl", "--model", MODEL, "--gpus", "8", "--out", "b.yaml"]) == 0
    assert asked == []

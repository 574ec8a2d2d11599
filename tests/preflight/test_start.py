"""Checks before a start besides the typical mistakes: the run's folder, the base, the packs, evaluation sources."""

import json
import shutil
from pathlib import Path

import fp8_files as fp8
import pytest
import torch
from starts import toy_run

from data.open import open_corpus
from data.render.sample import Renderer
from finetune.checkpoint.run_folder import make_run_folder
from finetune.files.tiny import TinyModel, write_tiny
from finetune.preflight.start import require_start
from finetune.settings.recipes import load_recipe
from launchers.cli import main

WORDS = ["model.path=base", "data.sources.general.path=rows.jsonl", "parallel.ep=1", "data.packs_per_step=2"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(toy_run(tmp_path, images=True))
    return tmp_path


def look(*words: str, trains: bool = True) -> list[str]:
    """Return the lines of a start, or those of its error."""
    config, problems = load_recipe("tiny-cpu", [*WORDS, *words])
    try:
        return require_start(config, problems, ranks=1, trains=trains)
    except ValueError as error:
        return str(error).splitlines()[1:]


def only(*words: str, trains: bool = True) -> str:
    (line,) = look(*words, trains=trains)
    return line.strip()


def test_the_packs_are_those_of_the_run_once_its_samples_are_counted(place: Path) -> None:
    assert only().startswith("data: the number of packs is not known yet")
    config, _ = load_recipe("tiny-cpu", WORDS)
    data = config.data
    renderer = Renderer(Path("base"), image=data.image, video=data.video, chat=data.chat)
    open_corpus(data, renderer)
    assert only() == "data: 4 packs and 2 steps per epoch"  # 24 rows of 94 and fewer tokens, in packs of 512
    assert only("data.packs_per_step=5") == (
        "data.packs_per_step = 5: an epoch fills only 4 packs of 512 tokens, which is no step. Lower "
        "data.packs_per_step or data.tokens_per_pack, add data, or set data.remainder=keep."
    )
    assert only("data.packs_per_step=5", "data.remainder=keep") == "data: 4 packs and 1 step per epoch"
    assert "18 of 24 samples of data.sources.general do not fit a pack of 64 tokens" in only("data.tokens_per_pack=64")
    assert "the longest has 94 tokens" in only("data.tokens_per_pack=64")
    assert only("data.tokens_per_pack=64", "data.overlong=skip") == "data: 2 packs and 1 step per epoch"
    assert "not known yet" in only("data.image.max_tokens=32", "data.image.min_tokens=4")  # other lengths


def test_a_run_folder_must_be_writable_and_large_enough(place: Path) -> None:
    assert only("run.folder=/proc/runs").startswith("run.folder = '/proc/runs': /proc cannot be written:")
    large = only("checkpoint.keep=100000000")
    assert "GB free, and the run still writes 9" in large
    assert "(checkpoints 9" in large
    Path("taken").write_text("a file")
    assert "taken cannot be written: Not a directory" in only("run.folder=taken")
    assert "not known yet" in only("run.folder=/proc/runs", trains=False)  # a rehearsal leaves it alone


def test_a_folder_with_another_run_is_refused(place: Path) -> None:
    config, _ = load_recipe("tiny-cpu", [*WORDS, "optim.lr=0.5"])
    make_run_folder(config.run.path, config)
    (config.run.path / "metrics.jsonl").touch()
    assert "runs/tiny-cpu already contains a run, and no checkpoint to resume from" in only()
    assert "not known yet" in only("optim.lr=0.5")  # its own


def test_a_base_must_be_whole_and_of_the_family(place: Path) -> None:
    assert "model.path = '': training needs a base model" in only("model.path=")
    weights = Path("base/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in only()
    assert "`moetune verify-base` checks every part of it" in only()
    weights.unlink()
    assert "base holds no weights" in only()
    write_tiny(Path("larger"), TinyModel(layers=4))
    assert "larger/config.json differs: text_config.num_hidden_layers is 4" in only("model.path=larger")
    assert "not known yet" in only("model.path=larger", "model.family=null")
    shutil.rmtree("larger")
    Path("larger").mkdir()
    assert "larger lacks config.json" in only("model.path=larger")


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ("", "it contains no row"),
        ("not JSON\n", "no sample can be used: row 1: "),
        ('{"messages": 3}\n', "no sample can be used: row 1: messages is a int; write a list of turns"),
        (
            '{"instruction": "a", "output": "b", "image": "x.png"}\n',
            "no sample can be used: row 1: images[0]: the file x.png does not exist",
        ),
    ],
)
def test_rows_of_evaluation_are_looked_at_too(rows: str, cause: str, place: Path) -> None:
    Path("held.jsonl").write_text(rows)
    assert f"eval.sources.held.path = 'held.jsonl': {cause}" in only("eval.sources.held.path=held.jsonl")


def test_one_bad_row_among_good_ones_is_a_warning(place: Path) -> None:
    rows = Path("rows.jsonl")
    rows.write_text("not JSON\n" + rows.read_text())
    warning, line = look()
    assert warning.startswith("warning: data.sources.general.path = 'rows.jsonl': not all of the first 8 samples")
    assert "not known yet" in line


def test_check_warns_of_paths_that_are_not_here(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny-cpu"]) == 0
    assert capsys.readouterr().err == ""  # the paths of a shipped recipe are examples
    assert main(["check", "tiny-cpu", "data.sources.general.path=nowhere", "model.path=/no/base"]) == 0
    data, base = capsys.readouterr().err.splitlines()
    assert data.startswith("warning: data.sources.general.path = 'nowhere': there is no such file or folder in /")
    assert base.startswith("warning: model.path = '/no/base': there is no such file or folder.")
    Path("mine.yaml").write_text("base: tiny-cpu\ndata: {sources: {general: {path: shards/mine}}}\n")
    assert main(["check", "mine.yaml"]) == 0
    assert "'shards/mine': there is no such file" in capsys.readouterr().err
    assert main(["check", "mine.yaml", "data.sources.general.path='{a,b}/*.tar'"]) == 0
    assert capsys.readouterr().err == ""  # a pattern may match later


def test_a_damaged_or_otherwise_quantised_base_is_named_before_any_rank_starts(place: Path) -> None:
    write_tiny(place / "fp8", TinyModel(fp8="per-expert"))
    assert "not known yet" in only("model.path=fp8")
    name = "model.language_model.layers.0.mlp.experts.3.up_proj.weight_scale_inv"
    fp8.changed(place / "fp8", **{name: torch.full((1, 1), float("nan"))})
    assert f"{name} holds the scale nan; a scale must be a finite number above 0" in only("model.path=fp8")
    fp8.changed(place / "fp8", **{name: None})
    assert f"fp8 tensors without scales (1): {name} missing" in only("model.path=fp8")
    file = place / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    for command in (["check"], ["plan", "--gpus", "1", "--gpu", "h100-80gb"]):
        assert main([*command, "tiny-cpu", *WORDS]) == 2
    assert "the base is quantised by gptq (quantization_config.quant_method), which cannot be read" in only()

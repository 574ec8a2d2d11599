"""Tests of `moetune check` and of the command line in general."""

import json
import subprocess
import sys

import pytest
from limits import LIMIT_S
from places import GOLDEN, ROOT

from finetune.settings.recipes import effective, load_recipe, recipe_names
from launchers.cli import COMMANDS, main


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict]:
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_unchanged(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Renew after an intended change with `moetune check NAME --json > tests/golden/check-NAME.json`; read the diff."""
    code, answer = _json(capsys, "check", name)
    assert (code, answer["problems"]) == (0, [])
    assert answer == json.loads((GOLDEN / f"check-{name}.json").read_text())


def test_derivations_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "qwen3-vl-30b-a3b-lora", "--ranks", "16"]) == 0
    printed = capsys.readouterr().out
    assert "tokens per step = 32 packs x 8,192 = 262,144" in printed
    assert "micro-batches per step = 32 packs / 16 data ranks = 2 per rank" in printed
    assert "16 ranks (--ranks): 2 expert-parallel groups of 8" in printed
    assert "= 31,070,754,032" in printed
    assert "experts per rank = 128 / ep 8 = 16 in each of 48 layers" in printed
    assert "packs_per_step: 32" in printed


def test_shares_of_a_mixture_are_derived(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = _json(
        capsys, "check", "tiny-cpu", "data.sources.b.path=x", "data.sources.b.weight=3", "data.mixture=tokens"
    )
    assert (code, answer["derived"]["share.b"]["value"]) == (0, 0.75)


def test_two_problems_exit_with_2_and_no_traceback() -> None:
    command = [
        sys.executable,
        "-m",
        "launchers.cli",
        "check",
        "configs/tiny-cpu.yaml",
        "optim.lr=abc",
        "data.sourcez=[]",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert "error: optim.lr = 'abc' (command line): it must be a number" in done.stderr
    assert "error: data.sourcez = [] (command line): no such key. Did you mean `data.sources`" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_json_lists_problems(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = _json(capsys, "check", "tiny-cpu", "optim.lr=abc")
    assert code == 2
    assert answer["derived"] == {}
    (problem,) = answer["problems"]
    assert (problem["key"], problem["found"], problem["source"]) == ("optim.lr", "abc", "command line")


def test_diff_shows_the_difference_of_two_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = _json(capsys, "check", "tiny-cpu", "optim.lr=0.5", "--diff", "tiny-cpu")
    assert (code, answer["difference"]) == (0, {"optim.lr": {"tiny-cpu with overrides": 0.5, "tiny-cpu": 0.001}})
    assert main(["check", "tiny-cpu", "--diff", "tiny-cpu"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    code, answer = _json(capsys, "check", "qwen3-vl-30b-a3b-lora", "--diff", "tiny-cpu")
    assert answer["difference"]["parallel.ep"] == {"qwen3-vl-30b-a3b-lora": 8, "tiny-cpu": 2}


def test_warnings_do_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny-cpu", "data.tokens_per_pack=99999999"]) == 0
    assert "warning: data.tokens_per_pack" in capsys.readouterr().err


def test_check_refuses_a_mask_that_is_too_wide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny-cpu", "model.attention=sdpa"]) == 0
    assert main(["check", "tiny-cpu", "model.attention=sdpa", "data.tokens_per_pack=16384"]) == 2
    error = capsys.readouterr().err
    assert "model.attention" in error
    assert "a mask of 16,384 x 16,384 for a packed row; the limit is 8,192 tokens" in error
    assert "model.attention=auto" in error


def test_a_missing_recipe_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny-cpuu"]) == 2
    assert capsys.readouterr().err.startswith("moetune check: recipe 'tiny-cpuu': neither a file")
    with pytest.raises(ValueError, match="neither a file"):
        main(["check", "tiny-cpuu", "--debug"])


@pytest.mark.parametrize("ranks", ["0", "two", "-1"])
def test_ranks_must_be_a_positive_number(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", "tiny-cpu", f"--ranks={ranks}"])
    assert "it must be a whole number from 1" in capsys.readouterr().err


def test_overrides_may_come_before_and_after_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = _json(capsys, "check", "tiny-cpu", "run.seed=4", "--ranks", "4", "optim.lr=0.5")
    assert (code, answer["config"]["run"]["seed"], answer["config"]["optim"]["lr"]) == (0, 4, 0.5)
    for wrong in (["--rank", "4"], ["--ranks", "4", "stray"], ["--ranks=2", "--x=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["check", "tiny-cpu", *wrong])
        assert "unrecognized arguments" in capsys.readouterr().err


def test_an_unknown_command_is_refused_and_the_version_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["chekc"])
    assert "invalid choice: 'chekc'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("moetune ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_a_worked_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"moetune {name}" in capsys.readouterr().out.split("example:")[1]


def test_effective_config_is_complete() -> None:
    config, _ = load_recipe("tiny-cpu")
    expected = "objective model adapters moe parallel data loss optim schedule stages context engine eval checkpoint"
    assert " ".join(effective(config)) == f"{expected} track run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image.max_tokens=0", "data.image.max_tokens = 0: it must be at least 1"),
        ("data.video.max_tokens_per_frame=0", "data.video.max_tokens_per_frame = 0: it must be at least 1"),
        ("data.video.min_frames=900", "data.video.min_frames = 900: it must not be above data.video.max_frames, 768"),
        ("data.video.fps=0", "data.video.fps = 0.0: it must be a finite number above 0"),
        ("data.video.timeout_seconds=.nan", "data.video.timeout_seconds = nan: it must be a finite number above 0"),
        ("run.name=../elsewhere", "run.name = '../elsewhere': it must name a folder below run.folder, runs"),
        ("run.name=/tmp/x", "run.name = '/tmp/x': it must name a folder below run.folder, runs"),
        ("run.name=.", "run.name = '.': it must name a folder below run.folder, runs"),
        ("run.seed=9223372036854775808", "it must be below 9223372036854775808, the limit of random generators"),
    ],
)
def test_impossible_sizes_names_and_seeds_are_refused(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "tiny-cpu", override]) == 2
    assert message in capsys.readouterr().err


def test_closing_the_output_early_prints_no_error():
    command = [sys.executable, "-m", "launchers.cli", "check", "tiny-cpu"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None
    started.stdout.close()  # as `head` does
    assert started.communicate()[1] == ""
    assert started.returncode == 1

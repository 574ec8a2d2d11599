"""The loop as a user starts it: a base and a JSONL file in, metrics and an adapter out that stock PEFT reads."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

import pytest
import torch
from corpora import renderer, write_shards
from limits import LIMIT_S
from peft import PeftModel
from safetensors.torch import load_file
from starts import environment, toy_run
from transformers import AutoModelForImageTextToText
from user_runs import TORCHRUN, TRAIN, metrics, start

from data.config import DataConfig, SourceConfig
from data.format.tar import TarWriter
from data.prepare.folder_lock import process_start, this_process
from finetune.checkpoint.run_folder import make_run_folder
from finetune.config import RunConfig, ScheduleConfig
from finetune.ranks.log import RankLog
from finetune.ranks.watch import Watch
from finetune.settings.recipes import load_recipe
from finetune.settings.schedule import learning_rate
from finetune.train import main
from finetune.training.dry_run import rehearse
from finetune.training.evaluation import one_row_each
from finetune.training.steps import open_together

LORA = ["adapters.attention.mode=lora", "adapters.experts.mode=lora", "adapters.router.mode=full", "moe.balance=global"]
BITS = ("step", "loss", "loss_balance", "grad_norm", "tokens", "tokens_supervised")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base, and rows of which every fourth has no image."""
    return toy_run(tmp_path_factory.mktemp("user"), 48, images=True)


LAST_STEP_WAITS = """
import os, sys, time
steps = []
def at_its_record(event, arguments):  # so that a slow machine does not end the run before it is killed
    if event == "open" and os.environ.get("RANK") == "0" and str(arguments[0]).endswith("metrics.jsonl"):
        steps.append(arguments[1])
        if steps.count("a") == 6:
            time.sleep(3600)
sys.addaudithook(at_its_record)
"""


def _train(place: Path, name: str, *words: str, ranks: int = 2, kill_after: str = "") -> CompletedProcess[str]:
    """Run to the end, or until a line of standard output begins with `kill_after`: then kill every process.

    A second start of the same run is refused before that.
    """

    def kill(pid: int) -> None:
        with _second_start(place, name) as second:
            _assert_refused(second, name)
        os.killpg(pid, signal.SIGKILL)

    then, site = (kill, LAST_STEP_WAITS) if kill_after else (None, "")
    command = [*TRAIN, "--ranks", str(ranks)]
    return start(place, command, name, "data.workers=0", *words, at=kill_after, then=then, site=site)


def _second_start(place: Path, name: str) -> Popen[str]:
    words = ["tiny-cpu", f"run.name={name}", "parallel.ep=1", "model.path=base", "data.sources.general.path=rows.jsonl"]
    return Popen([*TRAIN, *words], cwd=place, env=environment(), stderr=PIPE, text=True, start_new_session=True)


def _assert_refused(second: Popen[str], name: str) -> None:
    lines = second.communicate(timeout=LIMIT_S)[1].splitlines()
    assert second.returncode == 2, lines
    assert len(lines) <= 2, lines
    # the check before the start finds it; if both start at once, the lock does
    assert re.fullmatch(
        rf"(moetune train|  run.name = '{name}'): runs/{name} is in use by process \d+ on \S+, since \d{{4}}-.* "
        r"\(started by torchrun \w+\). Wait for it to end, or set another run.name\.?",
        lines[-1],
    ), lines


def test_of_two_starts_of_one_run_at_once_one_trains(place: Path) -> None:
    with _second_start(place, "twice") as one, _second_start(place, "twice") as other:
        while one.poll() is None and other.poll() is None:
            time.sleep(0.05)
        first, second = (one, other) if one.poll() is None else (other, one)
        os.killpg(first.pid, signal.SIGKILL)
        _assert_refused(second, "twice")
        assert first.wait(LIMIT_S) == -signal.SIGKILL


def test_a_rank_started_by_another_launcher_does_not_touch_a_run_in_use(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    alive = replace(this_process("another"), pid=os.getppid(), started=process_start(os.getppid()))
    (place / "runs" / "busy").mkdir(parents=True)
    (place / "runs" / "busy" / "lock.json").write_text(json.dumps(vars(alive)))
    assert main(["tiny-cpu", "parallel.ep=1", "run.name=busy", "run.stall_seconds=0"]) == 2
    assert f"moetune train, rank 0: runs/busy is in use by process {alive.pid} on " in capsys.readouterr().err
    assert [path.name for path in (place / "runs" / "busy").iterdir()] == ["lock.json"]


def test_two_ranks_learn_and_stock_peft_reads_the_adapter(place: Path) -> None:
    done = _train(place, "two", *LORA, "schedule.steps=8", "schedule.warmup_steps=2", "optim.lr=5e-3")
    assert done.returncode == 0, done.stderr[-3000:]
    steps = metrics(place, "two")
    assert [step["step"] for step in steps] == list(range(8))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert all(step["loss_balance"] >= 1 and step["grad_norm"] > 0 for step in steps)
    assert steps[0]["lr"] == pytest.approx(2.5e-3)
    for text in (
        "tokens per step = 8 packs x 512",
        "attention: auto",
        "frozen weights resident",
        "adapter: runs/two/adapter",
    ):
        assert text in done.stdout
    ids = torch.arange(40)[None]
    base = AutoModelForImageTextToText.from_pretrained(place / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, place / "runs" / "two" / "adapter").eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1


@pytest.fixture(scope="module")
def whole(place: Path) -> list[str]:
    """Return the answers of an undisturbed run of two ranks."""
    words = [*LORA, "schedule.steps=6", "optim.eps=1e-6", "checkpoint.every_steps=2", "moe.balance=off"]
    words += ["context.yarn.factor=2", "stages.grown.from_step=3"]
    done = _train(place, "whole", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return words


def test_one_rank_takes_the_same_steps_as_two(place: Path, whole: list[str]) -> None:
    """Start it as a cluster does, with the raw module under torchrun; and remove its logs."""
    raw, logs = [*TORCHRUN, "--nproc_per_node=1", "-m", "finetune.train"], place / "runs" / "one" / "logs"
    words = [*whole, "data.workers=0", "parallel.ep=1", "parallel.resident=none"]
    done = start(place, raw, "one", *words, at="step 1:", then=lambda _: shutil.rmtree(logs, ignore_errors=True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((logs / "outcome.json").read_text())["outcome"] == "done"
    for two, one in zip(metrics(place, "whole"), metrics(place, "one"), strict=True):
        for key in ("loss", "grad_norm", "tokens", "tokens_supervised"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


@pytest.mark.slow
def test_a_killed_run_continues_on_another_number_of_ranks(place: Path, whole: list[str]) -> None:
    """Continue with three ranks and complete rows; two ranks shared each row before, and 3 does not divide 8 packs."""
    first = _train(place, "cut", *whole, "parallel.sp=2", "stages.grown.sp=1", kill_after="step 4:")
    assert first.returncode != 0
    again = _train(place, "cut", *whole, "parallel.ep=1", ranks=3)
    assert again.returncode == 0, again.stderr[-2000:]
    assert len(re.findall(r"took over runs/cut from process .*: that process has ended", again.stdout)) == 1
    assert not (place / "runs" / "cut" / "lock.json").exists()
    assert "2 of 3 data ranks take 3 packs per step" in again.stdout
    assert again.stderr == ""
    logs = place / "runs" / "cut" / "logs"
    alarming = "assuming the intent is to load in a single process"  # torch warns at each resume
    assert alarming in (logs / "rank-0000.log").read_text()
    assert alarming not in again.stdout + (logs / "launcher.log").read_text()
    assert "resumed: runs/cut/checkpoints/step-000004, saved by 2 ranks; 2 steps to go" in again.stdout
    assert "rotary positions: yarn x 2 over 4,096, theta 5,000,000" in again.stdout
    assert "warning: context.yarn.factor=2 is not needed: the largest position in the data is below" in again.stdout
    for uncut, cut in zip(metrics(place, "whole"), metrics(place, "cut"), strict=True):
        assert cut["step"] == uncut["step"]
        assert cut["loss"] == pytest.approx(uncut["loss"], rel=1e-4)


@pytest.mark.slow  # three starts
def test_a_killed_run_with_dropout_continues_bit_for_bit(place: Path) -> None:
    words = [f"adapters.{part}.dropout=0.3" for part in ("attention", "experts", "vision_blocks")]
    words += [*LORA, "schedule.steps=6", "checkpoint.every_steps=2", "data.packs_per_step=4"]
    uncut = _train(place, "masks", *words)
    assert uncut.returncode == 0, uncut.stderr[-3000:]
    _train(place, "masks-cut", *words, kill_after="step 4:")
    again = _train(place, "masks-cut", *words)
    assert "resumed: runs/masks-cut/checkpoints/step-000004" in again.stdout, again.stderr[-2000:]
    for whole, cut in zip(metrics(place, "masks"), metrics(place, "masks-cut"), strict=True):
        assert {key: whole[key] for key in BITS} == {key: cut[key] for key in BITS}
    ours, theirs = (
        load_file(place / "runs" / name / "adapter" / "adapter_model.safetensors") for name in ("masks", "masks-cut")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("text", ["run: {name: [", "\0", "a: b: c", ""])
def test_a_truncated_config_is_taken_for_another_run(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/tiny-cpu")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    (folder / "config.yaml").write_text(text)
    config, _ = load_recipe("tiny-cpu")
    with pytest.raises(ValueError, match="runs/tiny-cpu already contains a run, and no checkpoint to resume from"):
        make_run_folder(folder, config)
    (folder / "metrics.jsonl").unlink()
    make_run_folder(folder, config)
    (folder / "metrics.jsonl").touch()
    make_run_folder(folder, config)  # it begins again
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["optim.lr=abc", "data.sourcez=1"], r"2 problems in the configuration:\n  optim.lr = 'abc'"),
        (["optim.lr=abc", "--dry-run", "--replay", "x", "data.sourcez=1"], r"2 problems in the configuration:"),
        (["adapters.embeddings.mode=lora"], r"adapters.embeddings.mode"),
        (["run.name=old"], r"runs/old already contains a run, and no checkpoint to resume from. Set another run.name"),
    ],
)
def test_wrong_input_is_found_before_anything_starts(
    place: Path, words: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (place / "runs" / "old").mkdir(parents=True, exist_ok=True)
    (place / "runs" / "old" / "metrics.jsonl").write_text("")
    assert main(["--local_rank=0", "tiny-cpu", "parallel.ep=1", *words]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "usage: torchrun" in capsys.readouterr().err


def test_a_path_that_does_not_exist_is_one_message_before_any_rank(place: Path) -> None:
    done = _train(place, "wrong", "data.sources.general.path=nowhere.jsonl", *LORA)
    assert done.returncode == 2
    key = "  data.sources.general.path = 'nowhere.jsonl': "
    assert re.fullmatch(rf"moetune train: 1 problem that keeps the run from starting:\n{key}.*\n", done.stderr)
    assert not (place / "runs" / "wrong").exists()


def test_the_learning_rate_warms_up_and_decays() -> None:
    schedule = ScheduleConfig(steps=10, warmup_steps=4, shape="linear", final_share=0.1)
    rates = [learning_rate(step, peak=2.0, schedule=schedule) for step in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[9:] == pytest.approx([0.2, 0.2, 0.2])
    cosine = ScheduleConfig(steps=5, shape="cosine")
    assert [learning_rate(s, peak=1.0, schedule=cosine) for s in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    flat = ScheduleConfig(steps=5, shape="constant", warmup_steps=1)
    assert {learning_rate(s, peak=3.0, schedule=flat) for s in range(9)} == {3.0}


def test_a_dry_run_takes_one_real_step_and_leaves_nothing(place: Path) -> None:
    done = _train(place, "dry", *LORA, "track.wandb=offline", "eval.sources.held.path=rows.jsonl", "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    for text in (
        "evaluation at step 0, held: loss",
        "evaluation at step 1, held: loss",
        "shards: every header is valid",
        "step 0: loss",
        "memory of rank 1: at most",
        "adapter: runs/dry.dry-run/adapter",
        "dry run: passed; no files are kept",
    ):
        assert text in done.stdout
    assert not list((place / "runs").glob("dry*"))


def _rehearse(*words: str) -> list[tuple[int, str]]:
    """Return the steps and the folder of the run that a dry run trains."""
    config, problems = load_recipe("tiny-cpu", words)
    assert problems == []
    trained = []

    def train(config: RunConfig, folder: Path, *_: object) -> int:
        trained.append((config.schedule.steps, str(folder)))
        return 0

    log = RankLog(Path("runs/dry.dry-run.logs"), 0)
    try:
        assert rehearse(config, Path("runs/dry"), train, log, Watch(log, data_stall=0, step_stall=0)) == 0
    finally:
        log.close()
    return trained


def test_a_dry_run_lists_bad_samples_and_continues_like_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", count=4, per_shard=4)
    (tmp_path / "shards" / "part-009.tar").write_bytes((tmp_path / "shards" / "part-000.tar").read_bytes())
    with TarWriter(tmp_path / "shards" / "part-010.tar") as tar:
        tar.add("bad.json", b'{"v": 1}')
    assert _rehearse("data.sources.general.path=shards", "eval.sources.held.path=shards") == [(1, "runs/dry.dry-run")]
    output = capsys.readouterr().out
    assert "shards: 8 warnings on samples that training uses; see `moetune shards check`" in output
    assert "shards: 2 problems; training continues" in output
    assert "sample bad: messages is " in output
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]  # and no runs/


def test_samples_that_are_left_out_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path, count=4, per_shard=4)
    with TarWriter(tmp_path / "part-010.tar") as tar:
        tar.add("bad.json", b'{"v": 1}')
    config = DataConfig(sources={"a": SourceConfig(path=str(tmp_path))})
    corpus = open_together(config, renderer(), section="data")
    assert [item.key for item in corpus.unusable] == ["bad"]
    assert len([text for text in caplog.messages if text.startswith("left out: ")]) == 1


def test_a_dry_run_checks_the_places_of_evaluation_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", count=4, per_shard=4)
    with pytest.raises(ValueError, match="eval.sources.held.path names 'nowhere', which does not exist"):
        _rehearse("data.sources.general.path=shards", "eval.sources.held.path=nowhere")


def test_a_rehearsed_evaluation_takes_one_row_of_each_source(tmp_path: Path) -> None:
    sources = {name: SourceConfig(path=str(write_shards(tmp_path / name)[0].parent)) for name in ("a", "b")}
    corpus = open_together(DataConfig(sources=sources), renderer(), section="eval")
    for tokens in (1, 100):
        for whole, row in zip(corpus.sources, one_row_each(corpus, tokens=tokens).sources, strict=True):
            assert row.name == whole.name
            assert 0 < len(row) < len(whole)
            assert len(row) == 1 or row.tokens.sum() <= tokens < row.tokens.sum() + whole.tokens[len(row)]
            assert [*row.sample] == [*whole.sample[: len(row)]]

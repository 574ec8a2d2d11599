"""The length of a run: epochs become steps, also in a resumed run; and more steps if the learning rates allow them."""

import json
from pathlib import Path

import pytest
from corpora import write_shards
from length_session import runs
from ranks import run_ranks

from data.shards.sidecar import read_arrays
from finetune.checkpoint.manifest import config_difference
from finetune.config import ScheduleConfig
from finetune.files.tiny import TinyModel, write_tiny
from finetune.settings.check_schedule import with_steps
from finetune.settings.checks import cross_check
from finetune.settings.derive import derive
from finetune.settings.recipes import effective, load_recipe
from finetune.settings.schedule import first_difference
from launchers.cli import main

WORDS = (
    "model.path=tiny",
    "data.sources.general.path=shards",
    "data.workers=0",
    "data.packs_per_step=2",
    "data.remainder=keep",
    "checkpoint.every_steps=1",
    "checkpoint.keep=20",
)
CONSTANT = (*WORDS, "schedule.shape=constant")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_epochs_read_every_sample_equally_often_and_can_be_extended(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny", TinyModel(image_min_tokens=4))
    write_shards(tmp_path / "shards", count=20, per_shard=20)
    epochs = (*WORDS, "schedule.epochs=2", "schedule.warmup_steps=1")
    jobs = [
        ("twice", epochs, ""),
        ("again", epochs, "runs/twice/checkpoints/step-000001"),
        ("part", (*WORDS, "schedule.epochs=1.5"), ""),
        ("long", (*CONSTANT, "schedule.steps=4"), ""),
        ("grown", (*CONSTANT, "schedule.steps=2"), ""),
        ("grown", (*CONSTANT, "schedule.steps=4"), ""),
        ("twice", (*epochs, "schedule.epochs=3"), ""),
    ]
    assert run_ranks(runs, ranks, jobs) == [[0, 0, 0, 0, 0, 0, 2]] * ranks

    twice = _metrics("twice")
    once = len(twice) // 2
    assert once > 1
    assert len(twice) == 2 * once
    first, second = (sum(step["tokens"] for step in steps) for steps in (twice[:once], twice[once:]))
    assert first == second == _tokens("shards/part-000.tar.len")
    assert main(["check", "tiny-cpu", *epochs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["derived"]["steps"]["value"] == len(twice)
    assert main(["plan", "tiny-cpu", *epochs, "--gpus", "2", "--gpu", "h100-80gb"]) == 0
    assert f"\n{len(twice)} steps: " in capsys.readouterr().out
    assert main(["check", "tiny-cpu", *epochs, "data.image.max_tokens=20", "--json"]) == 0
    unknown = "steps = those of 2 epochs, known when the shards are indexed"
    assert json.loads(capsys.readouterr().out)["derived"]["steps"] == {"value": 0, "derivation": unknown}
    assert twice[-1]["lr"] == 0  # the cosine ends with the last of these steps
    assert [_exact(step) for step in _metrics("again")] == [_exact(step) for step in twice[1:]]
    assert len(_metrics("part")) == once + round(once / 2)
    assert [_exact(step) for step in _metrics("grown")] == [_exact(step) for step in _metrics("long")]
    log = Path("runs/grown/logs/rank-0000.log").read_text()
    assert "schedule.steps: 2 in the checkpoint, 4 now; the 2 steps taken had the same learning rates" in log
    refused = Path("runs/twice/logs/rank-0000.log").read_text()
    assert "schedule.epochs: 2.0 in the checkpoint, 3.0 now" in refused
    assert f"The learning rates of the {2 * once} steps taken depend on the schedule (cosine)" in refused
    assert "adapters.start_from=runs/twice/checkpoints/step-" in refused


def _metrics(name: str) -> list[dict]:
    return [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]


def _exact(step: dict) -> dict:
    return {name: step[name] for name in ("step", "loss", "grad_norm", "tokens", "lr")}


def _tokens(lengths: str) -> int:
    """Return the tokens of all samples, as counted in the index next to their shard."""
    arrays = read_arrays(Path(lengths))
    assert arrays is not None
    return int(arrays["text"].sum() + arrays["vision"].sum())


def _length(tmp_path: Path, text: str, *words: str) -> tuple[int, float, list[str]]:
    (tmp_path / "below.yaml").write_text("base: tiny-cpu\nschedule: {steps: 70}\n")
    (tmp_path / "mine.yaml").write_text(f"base: below.yaml\nschedule: {{{text}}}\n")
    config, problems = load_recipe(str(tmp_path / "mine.yaml"), words)
    return config.schedule.steps, config.schedule.epochs, [str(problem) for problem in problems]


def test_the_later_setting_of_steps_and_epochs_decides(tmp_path: Path) -> None:
    assert _length(tmp_path, "") == (70, 0, [])
    assert _length(tmp_path, "epochs: 2") == (0, 2, [])
    assert _length(tmp_path, "epochs: 2", "schedule.steps=5") == (5, 0, [])
    assert _length(tmp_path, "epochs: 2", "schedule.epochs=0") == (70, 0, [])
    assert _length(tmp_path, "epochs: 2, steps: 0") == (0, 2, [])  # as in config.yaml of a run
    *_, problems = _length(tmp_path, "epochs: 2, steps: 9")
    assert problems == [
        "schedule.epochs = 2 (mine.yaml): schedule.steps is also set, to 9, but only one of them can decide the "
        "length of the run. Remove one of the two."
    ]


def _problems(*words: str) -> list[str]:
    config, problems = load_recipe("tiny-cpu", ["schedule.epochs=2", *words])
    return [str(problem) for problem in [*problems, *cross_check(config, ranks=2)]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.epochs=-1"], "schedule.epochs = -1.0: it must be a finite number above 0"),
        (["schedule.warmup_steps=-1"], "schedule.warmup_steps = -1: it must be at least 0."),
        (["schedule.shape=wsd"], "schedule.decay_steps = 0: with shape wsd it must be at least 1."),
        (["stages.late.from_step=-5"], "stages.late.from_step = -5: it must be at least 0."),
        (["stages.late.data.packs_per_step=4"], "the stages read different data, so an epoch has no fixed length"),
    ],
)
def test_invalid_numbers_of_epochs(words: list[str], message: str) -> None:
    (problem,) = _problems(*words)
    assert message in problem


def test_checks_of_the_number_of_steps_run_once_it_is_known() -> None:
    words = ["schedule.epochs=2", "schedule.warmup_steps=30", "stages.late.from_step=20"]
    assert _problems(*words) == []
    config, _ = load_recipe("tiny-cpu", words)
    texts = [number.text for number in derive(config, ranks=2)]
    assert "steps = those of 2 epochs, known when the shards are indexed" in texts
    assert any(text.startswith("stage late: from step 20 on train") for text in texts)
    assert with_steps(config, 40).schedule.steps == 40
    with pytest.raises(ValueError, match=r"schedule.warmup_steps = 30: it must be from 0 to the 10 steps") as error:
        with_steps(config, 10)
    assert "stages.late.from_step = 20: it must be a step of the run, 0 to 9" in str(error.value)


@pytest.mark.parametrize(
    ("before", "now", "first"),
    [
        (ScheduleConfig(steps=10, shape="constant"), ScheduleConfig(steps=20, shape="constant"), None),
        (ScheduleConfig(steps=10, shape="wsd", decay_steps=4), ScheduleConfig(steps=20, shape="wsd", decay_steps=4), 6),
        (ScheduleConfig(steps=10, shape="wsd", decay_steps=4), ScheduleConfig(steps=10, shape="constant"), 6),
        (ScheduleConfig(steps=10, warmup_steps=3), ScheduleConfig(steps=20, warmup_steps=3), 4),
        (ScheduleConfig(steps=10, shape="linear"), ScheduleConfig(steps=20, shape="linear"), 1),
    ],
)
def test_the_first_step_at_which_two_schedules_differ(
    before: ScheduleConfig, now: ScheduleConfig, first: int | None
) -> None:
    assert first_difference(before, now) == first


def test_a_run_continues_under_a_schedule_that_agrees_with_the_steps_taken() -> None:
    def config(*words: str) -> dict:
        return effective(load_recipe("tiny-cpu", words)[0])

    decays = config("schedule.shape=wsd", "schedule.steps=10", "schedule.decay_steps=4")
    longer = config("schedule.shape=wsd", "schedule.steps=30", "schedule.decay_steps=9")
    assert config_difference(decays, longer, done=6) == []
    lines = [f"schedule.{key} in the checkpoint, {now} now" for key, now in (("steps: 10", 30), ("decay_steps: 4", 9))]
    assert config_difference(decays, longer, done=7) == config_difference(decays, longer) == lines
    assert config_difference(longer, decays, done=12) != []  # so many steps are taken
    assert config_difference(decays, {**longer, "optim": {"lr": 5.0}}, done=6) != []
    uncounted, counted = config("schedule.epochs=2"), config("schedule.epochs=2")
    counted["schedule"]["steps"] = 34
    assert config_difference(counted, uncounted, done=3) == []

"""TensorBoard's files have the numbers of metrics.jsonl and evaluations.jsonl, even if steps were taken twice."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.stream.batch import LossSums, Step
from finetune.architecture.families import family
from finetune.config import RunConfig, TrackConfig
from finetune.ranks.log import RankLog
from finetune.settings.checks import require
from finetune.settings.problems import ConfigError
from finetune.tracking.tensorboard_writer import numbers
from finetune.tracking.track import Tracker


def _start(folder: Path, steps: range, evaluated: int) -> None:
    """Write one start of a run: its steps, then an evaluation."""
    log = RankLog(folder / "logs", 0)
    config = RunConfig(track=TrackConfig(tensorboard=True))
    base, device = family("qwen3-vl-30b-a3b"), torch.device("cpu")
    try:
        with Tracker(config, folder, base=base, device=device, log=log, done=steps.start) as tracker:
            for at in steps:
                step = Step(
                    epoch=0,
                    step=at,
                    batches=(),
                    sums=LossSums(),
                    bad=(),
                    notes=(),
                    tokens=0,
                    images=at,
                    video_seconds=0.0,
                    wait_seconds=0.25,
                )
                figures = {"loss": 7.0 - at + evaluated, "grad_norm": 1.0, "lr": 1e-4}
                tracker.step(at, step, figures, load=None, by_sample=[], seconds=1.5)
            tracker.evaluation({"step": evaluated, "seconds": 2.0, "held/loss": 3.5 + evaluated})
    finally:
        log.close()


def _read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a folder with TensorBoard's own reader; return each value with its step, by name."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in TensorBoard's reader
def test_files_have_every_number_once_even_if_a_step_was_repeated(tmp_path: Path) -> None:
    _start(tmp_path, range(3), 2)  # saved after two steps, killed after three
    _start(tmp_path, range(2, 4), 4)
    for kind, name in (("metrics", "train"), ("evaluations", "eval")):
        records = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == {"train": [0, 1, 2, 3], "eval": [2, 4]}[name]
        wanted: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            for key, value in numbers(record):
                wanted.setdefault(key, []).append((record["step"], pytest.approx(value, rel=1e-6)))
        assert _read(tmp_path / "tensorboard" / name) == wanted
        assert {"train": "images", "eval": "held/loss"}[name] in wanted


def test_a_run_without_a_save_starts_again_at_its_first_evaluation(tmp_path: Path) -> None:
    for _ in range(2):
        _start(tmp_path, range(0), 0)
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1
    assert _read(tmp_path / "tensorboard" / "eval")["held/loss"] == [(0, 3.5)]


def test_numbers_of_sources_have_their_own_names() -> None:
    record = {"step": 3, "loss": 2.0, "mfu": None, "sources": {"docs": {"samples": 4, "loss": None}}}
    assert dict(numbers(record)) == {"loss": 2.0, "source/docs/samples": 4}


def test_a_missing_package_is_a_problem_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(track=TrackConfig(tensorboard=True))
    monkeypatch.setattr("finetune.settings.checks.find_spec", lambda name: None)
    text = r"track.tensorboard = True: the package tensorboard is not installed. Run `pip install 'moetune\[tens"
    with pytest.raises(ConfigError, match=text):
        require(config, [], ranks=1, starts=True)

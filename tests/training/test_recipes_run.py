"""The shipped recipes unchanged, on tiny bases and small rows: they train, evaluate, and resume from a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_session import whole_tensors
from corpora import write_shards
from ranks import run_ranks
from recipe_session import SAVED_AT, runs
from safetensors.torch import load_file

import configs
from finetune.files.tiny import TinyModel, write_tiny

STEPS = 3
SHORT = (
    f"schedule.steps={STEPS}",
    "schedule.warmup_steps=1",
    "checkpoint.every_steps=1",
    "eval.every_steps=1",
    "eval.sources.held.path=shards/general",
    "data.remainder=keep",
    "data.workers=0",
)
"""The words of a short run over few samples: the last packs of an epoch are all that there are."""
TINY = {"tiny-cpu": ("model.path=tiny", *SHORT)}
LONG = "qwen3-vl-30b-a3b-long"
FULL = "qwen3-vl-30b-a3b-full"
BASE = ('model.family=""', "model.path=base", *SHORT)
BIG = {
    "qwen3-vl-30b-a3b-lora": BASE,
    "qwen3-vl-235b-a22b-lora": BASE,
    LONG: (
        *BASE,
        "stages.middle.from_step=1",
        "stages.long.from_step=2",
        "stages.middle.warmup_steps=0",
        "stages.long.warmup_steps=0",
    ),
}
HALVED = {name: (*words, "parallel.ep=2") for name, words in BIG.items()}
HALVED[LONG] += ("stages.middle.sp=2", "stages.long.sp=2")
"""The words for two ranks: the eight ranks of the recipes would take minutes on a small machine."""
SMALL = (*BASE, "data.image.min_tokens=4", "data.image.max_tokens=16")
DOMAINS = {
    "documents": SMALL,
    "screenshots": (*SMALL, "parallel.ep=2"),
    "medical": (*SMALL, "parallel.ep=2"),
    "long-video": (*SMALL, "parallel.ep=2", "parallel.sp=2"),
    FULL: (*BASE, "parallel.ep=2", "checkpoint.keep=3"),
    "qwen3-vl-30b-a3b-router": (*BASE, "parallel.ep=2"),
    "qwen3-vl-30b-a3b-one-gpu": BASE,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make bases, and shards where the recipes look for them: text, images, and a video."""
    write_tiny(tmp_path / "tiny", TinyModel(image_min_tokens=4))
    big = TinyModel(layers=2, vision_depth=2, heads=8, kv_heads=4, max_positions=262_144, image_min_tokens=4)
    write_tiny(tmp_path / "base", big)
    write_shards(tmp_path / "shards" / "general", count=12, per_shard=12)
    for name in ("long", "documents", "screens", "reports", "questions", "videos"):
        shutil.copytree(tmp_path / "shards" / "general", tmp_path / "shards" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "jobs"),
    [
        pytest.param(2, TINY | {LONG: HALVED[LONG]}, id="2 ranks"),
        pytest.param(
            2, {name: HALVED[name] for name in HALVED if name != LONG}, id="2 ranks, more", marks=pytest.mark.slow
        ),
        pytest.param(2, DOMAINS, id="2 ranks, domains", marks=pytest.mark.slow),
        pytest.param(8, BIG, id="8 ranks", marks=pytest.mark.slow),
    ],
)
def test_a_shipped_recipe_trains_evaluates_and_goes_on(place: Path, ranks: int, jobs: dict) -> None:
    assert run_ranks(runs, ranks, jobs) == [dict.fromkeys(jobs, [0, 0])] * ranks
    for recipe in jobs:
        whole, again = place / "runs" / recipe, place / "runs" / f"{recipe}-again"
        steps, resumed = lines(whole / "metrics.jsonl"), lines(again / "metrics.jsonl")
        assert [step["step"] for step in steps] == list(range(STEPS))
        assert all(step["grad_norm"] > 0 for step in steps)
        evaluations, later = lines(whole / "evaluations.jsonl"), lines(again / "evaluations.jsonl")
        assert [actual["step"] for actual in evaluations] == list(range(STEPS + 1))
        assert evaluations[-1]["held/loss"] != evaluations[0]["held/loss"]
        for actual, wanted in ((resumed, steps[SAVED_AT:]), (later, evaluations[SAVED_AT + 1 :])):
            assert [exact(line) for line in actual] == [exact(line) for line in wanted]
        assert (whole / ("model" if recipe == FULL else "adapter")).is_dir()
        for folder in () if recipe == FULL else ("adapter", "checkpoints/step-000003/adapter"):
            one, other = (load_file(run / folder / "adapter_model.safetensors") for run in (whole, again))
            assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
        one, other = (whole_tensors(run / "checkpoints/step-000003") for run in (whole, again))
        assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_every_shipped_recipe_is_run_here() -> None:
    shipped = {path.stem for path in Path(configs.__file__).parent.glob("*.yaml")}
    assert shipped == {*TINY, *BIG, *DOMAINS}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exact(line: dict) -> dict:
    """Return the fields that do not depend on the clock."""
    kept = ("step", "loss", "grad_norm", "tokens", "lr", "held/loss", "held/accuracy", "held/kl", "held/loss_base")
    return {name: line[name] for name in kept if name in line}

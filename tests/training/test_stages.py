"""Stages: their steps, their changes, and a run through three of them, interrupted and resumed anywhere."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_session import whole_tensors
from PIL import Image
from ranks import run_ranks
from stage_session import metrics, runs

from data.config import DataConfig, SourceConfig
from finetune.config import AdaptersConfig, DensePartConfig, RunConfig, ScheduleConfig, StageConfig, StageDataConfig
from finetune.files.tiny import write_tiny
from finetune.model.lora import adapted_part
from finetune.settings.checks import cross_check
from finetune.settings.derive import derive
from finetune.settings.recipes import load_recipe
from finetune.settings.schedule import learning_rate
from finetune.settings.stages import longest_pack, run_stages, stage_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base, and rows of which every second has an image."""
    folder = tmp_path_factory.mktemp("stages")
    write_tiny(folder / "base")
    rows = []
    for number in range(80):
        seen = number % 2 == 0
        if seen:
            Image.new("RGB", (48, 64), (3 * number, 90, 200)).save(folder / f"{number}.png")
        asked = {"role": "user", "content": "<image>Which?" if seen else "Say it."}
        row = {"messages": [asked, {"role": "assistant", "content": f"This is number {number}."}]}
        rows.append(row | ({"images": [f"{number}.png"]} if seen else {}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run_ranks(runs, 2, place) == [[0] * 4] * 2
    return place


def test_a_run_resumed_anywhere_equals_the_uninterrupted_one(finished: Path) -> None:
    """Compare them bit for bit, in a stage or at its boundary; at another layout, up to the order of sums."""
    whole = metrics(finished, "whole")
    assert [step["step"] for step in whole] == list(range(6))
    last = whole_tensors(finished / "runs/whole/checkpoints/step-000006")
    for steps in (2, 3, 4):
        again = metrics(finished, f"from-{steps}")
        assert [step["step"] for step in again] == list(range(steps, 6))
        tensors = whole_tensors(finished / f"runs/from-{steps}/checkpoints/step-000006")
        for old, new in zip(whole[steps:], again, strict=True):
            exact = {"epoch", "tokens", "lr"} | ({"loss", "grad_norm"} if steps != 3 else set())
            assert {key: old[key] for key in exact} == {key: new[key] for key in exact}
            assert new["loss"] == pytest.approx(old["loss"], rel=1e-5)
        for name, tensor in last.items():
            if name.startswith("random/"):
                continue
            if steps == 3:
                torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-4 * tensor.abs().max().item())
            else:
                assert torch.equal(tensors[name], tensor), name


def test_a_stage_changes_only_the_parameters_that_it_trains(finished: Path) -> None:
    saved = {n: whole_tensors(finished / f"runs/whole/checkpoints/step-{n:06d}") for n in range(1, 7)}

    def moved(first: int, last: int) -> set[str]:
        names = [name for name in saved[1] if name.startswith("master/")]
        changed = [name for name in names if not torch.equal(saved[first][name], saved[last][name])]
        return {adapted_part(name.removeprefix("master/")) for name in changed}

    everything = {"attention", "experts", "router", "merger"}
    assert moved(1, 2) == {"merger"}
    assert moved(2, 4) == everything
    assert moved(4, 6) == {"experts", "merger"}
    moments = {name: tensor for name, tensor in saved[2].items() if name.startswith("exp_avg")}
    assert all((tensor.abs().max() > 0) == ("merger" in name) for name, tensor in moments.items())


def test_a_stage_has_its_own_plan_and_rate(finished: Path) -> None:
    steps = metrics(finished, "whole")
    assert [step["epoch"] for step in steps[:3]] == [0, 1, 2]
    assert steps[2]["tokens"] < 0.5 * steps[1]["tokens"]  # 4 packs of 256 after 8 packs of 512
    log = (finished / "runs/whole/logs/rank-0000.log").read_text()
    for text in (
        "from step 0, stage align: merger train",
        "from step 2, stage all: attention, experts, router, merger train",
        "from step 4, stage experts: experts, merger train",
        "data, stage align: ",
        "stage align: steps 0 to 1 train merger at 0.002; 8 packs x 512 = 4,096 tokens per step",
    ):
        assert text in log


def _config(**stages: StageConfig) -> RunConfig:
    return RunConfig(
        adapters=AdaptersConfig(merger=DensePartConfig(mode="full", lr=2e-5)),
        data=DataConfig(sources={"a": SourceConfig(path="a.tar"), "b": SourceConfig(path="b.tar")}, mixture="tokens"),
        schedule=ScheduleConfig(steps=10, shape="constant"),
        stages=stages,
    )


def test_stages_divide_the_run() -> None:
    config = _config(
        late=StageConfig(from_step=6, data=StageDataConfig(tokens_per_pack=99, weights={"b": 3.0})),
        early=StageConfig(from_step=2, train=["merger"], lr=4e-4, warmup_steps=2),
    )
    stages = run_stages(config)
    assert [(stage.name, stage.first, stage.end) for stage in stages] == [("", 0, 2), ("early", 2, 6), ("late", 6, 10)]
    assert [stage_of(stages, step).number for step in range(10)] == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert stages[1].peaks == {"merger": 4e-4}
    assert stages[2].peaks == {"attention": 1e-4, "merger": 2e-5}
    assert stages[2].data.sources["b"].weight == 3.0
    assert stages[2].data.sources["a"].weight == 1.0
    assert longest_pack(stages) == 8192
    rates = [learning_rate(s, peak=1e-4, schedule=config.schedule, stage=stage_of(stages, s)) for s in range(8)]
    assert rates == pytest.approx([1e-4, 1e-4, 0.5e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4])
    assert [stage.steps for stage in run_stages(_config())] == [10]


def test_wsd_is_constant_and_decays_over_its_last_steps() -> None:
    schedule = ScheduleConfig(steps=10, warmup_steps=2, shape="wsd", decay_steps=4, final_share=0.2)
    rates = [learning_rate(step, peak=1.0, schedule=schedule) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def _problems(*words: str) -> str:
    config, problems = load_recipe("qwen3-vl-30b-a3b-lora", words)
    known = [problem.key for problem in problems]
    return "\n".join(f"{p.level}: {p}" for p in [*problems, *cross_check(config, ranks=None, known=known)])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["stages.a.from_step=1000"], "stages.a.from_step = 1000: it must be a step of the run, 0 to 999"),
        (
            ["stages.a.from_step=3", "stages.b.from_step=3"],
            "stages.b.from_step = 3: another stage begins at the same step",
        ),
        (["stages.a.train=[mergr]"], "stages.a.train = 'mergr': no such part. Did you mean `merger`"),
        (["stages.a.train=[merger]"], "stages.a.train = 'merger': adapters.merger.mode is frozen"),
        (["stages.a.train=[attention]"], "adapters.experts.mode = 'lora': no stage trains it"),
        (["stages.a.lr=-1"], "stages.a.lr = -1.0: it must be a finite number above 0, or 0 for optim.lr"),
        (["stages.a.warmup_steps=-1"], "stages.a.warmup_steps = -1: it must be at least 0"),
        (["stages.a.data.weights.x=1"], "stages.a.data.weights.x = 1.0: no such source"),
        (
            ["stages.a.data.weights.general=2"],
            "stages.a.data.weights.general = 2.0: it has no effect with data.mixture",
        ),
        (
            ["stages.a.data.tokens_per_pack=0"],
            "stages.a.data.tokens_per_pack = 0: it must be at least 1. Set stages.a.data.tokens_per_pack=1",
        ),
        (
            ["stages.a.data.packs_per_step=9"],
            "stages.a.data.packs_per_step = 9: it must be divisible by the 8 data ranks",
        ),
        (["schedule.steps=0"], "schedule.steps = 0: it must be at least 1"),
        (
            ["schedule.warmup_steps=2000"],
            "schedule.warmup_steps = 2000: it must be from 0 to the 1000 steps of the run",
        ),
        (["schedule.final_share=2"], "schedule.final_share = 2.0: it must be a share from 0 to 1"),
        (["schedule.shape=wsd"], "schedule.decay_steps = 0: with shape wsd it must be from 1 to 1000"),
        (["schedule.decay_steps=5"], "schedule.decay_steps = 5: it has no effect, because schedule.shape is cosine"),
        (["optim.betas=[1.0,0.9]"], "optim.betas = 1.0: the first one must be from 0 to below 1"),
        (["optim.eps=-1"], "optim.eps = -1.0: it must be a finite number of 0 or more"),
        (["adapters.attention.lr=-1"], "adapters.attention.lr = -1.0: it must be a finite number above 0, or 0"),
        (["adapters.merger.lr=1e-5"], "warning: adapters.merger.lr = 1e-05: the part is frozen"),
        (["optim.lr=1e-2"], "warning: optim.lr = 0.01: published rates are 2e-05 to 0.0005 for LoRA on attention"),
        (
            ["adapters.merger.mode=full", "adapters.merger.lr=1e-2"],
            "published rates are 1e-06 to 0.001 for full tuning of merger",
        ),
        (
            ["stages.a.lr=1e-2"],
            "warning: stages.a.lr = 0.01: published rates are 2e-05 to 0.0005 for LoRA on attention",
        ),
        (["adapters.attention.r=1024", "adapters.attention.alpha=1024"], "attention.r = 1024: published ranks are 1"),
        (["adapters.attention.alpha=1000"], "published alpha / r are 0.25 to 4"),
        (["data.packs_per_step=2048"], "warning: data.packs_per_step = 2048: published batches are 4 to 512 rows"),
    ],
)
def test_invalid_stages_are_reported(words: list[str], text: str) -> None:
    assert text in _problems(*words)


def test_the_shipped_recipe_is_within_the_published_values() -> None:
    assert "published" not in _problems()


def test_check_prints_the_stages() -> None:
    config, _ = load_recipe("tiny-cpu", ["stages.a.train=[merger]", "stages.b.from_step=7", "adapters.merger.lr=3e-4"])
    lines = {line.name: line for line in derive(config, ranks=2)}
    assert lines["stage.a"].value == 7
    assert (
        lines["stage.a"].text == "stage a: steps 0 to 6 train merger at 0.0003; 8 packs x 512 = 4,096 tokens per step"
    )
    assert "stage b: steps 7 to 999 train attention at 0.001, experts at 0.001" in lines["stage.b"].text

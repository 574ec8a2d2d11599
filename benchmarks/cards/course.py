"""Trains a base and adapters through `moetune train`, and scores them on held-out questions."""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cards.record import Base, Card
from benchmarks.cards.tasks import BASE, HELD_OUT, KEPT, Draw, Task
from benchmarks.harness.tiny_runs import SIZES, moetune, recipe, write_rows
from finetune.ask.open_model import open_speaker
from finetune.ask.scores import find_metric
from finetune.ask.speaker import Speaker
from finetune.probes.trial import answers

SAMPLES = {"base": 1200, "task": 800}
"""Training questions of each kind of the base's, and of a task."""
BASE_STEPS = 450
STEPS = 80
LAST = 20
"""Steps at the end whose load of the experts is averaged."""
SWITCHES = {
    "as is": "moe: {balance: global}\n",
    "balance: off": "moe: {balance: off}\n",
    "normalise: sqrt": "moe: {balance: global}\nloss: {normalise: sqrt}\n",
}
"""Changes to the training of a base."""
_LORA = {"attention": ("attention",), "experts": ("experts",), "both": ("attention", "experts")}
FIRST = 10**6


@dataclass(frozen=True, kw_only=True)
class Held:
    """A trained base, and its scores on its own letters."""

    model: Path
    kept: float


def train_base(switch: str, *, seed: int, folder: Path) -> tuple[Base, Held]:
    """Train every weight of a tiny model on the base's questions, and score each kind."""
    moetune(f"tiny {folder / 'start'} {SIZES} --seed {seed}")
    numbers = range(FIRST * (seed + 1), FIRST * (seed + 1) + SAMPLES["base"] * len(BASE))
    write_rows(folder / "base.jsonl", (BASE[number % len(BASE)](number) for number in numbers))
    moetune(f"shards build {folder / 'base.jsonl'} --out {folder / 'base-shards'}")
    path = recipe(
        folder,
        "base",
        model=folder / "start",
        shards=folder / "base-shards",
        steps=BASE_STEPS,
        rate=3e-3,
        more=SWITCHES[switch],
    )
    began = time.monotonic()
    moetune(f"train {path} --ranks 1 run.seed={seed}")
    seconds = time.monotonic() - began
    model = folder / "runs" / "base" / "model"
    speaker = open_speaker(str(model))
    scores = {draw.__name__.replace("_", " "): score(speaker, draw, "exact") for draw in BASE}
    steps = [json.loads(line) for line in (folder / "runs" / "base" / "metrics.jsonl").read_text().splitlines()]
    loads = [step for step in steps if step.get("experts_dead") is not None][-LAST:]
    base = Base(
        switch=switch,
        seed=seed,
        scores=scores,
        dead=statistics.fmean(step["experts_dead"] for step in loads),
        busiest=statistics.fmean(step["expert_load_max_over_mean"] for step in loads),
        seconds=round(seconds, 1),
    )
    return base, Held(model=model, kept=scores[KEPT.__name__])


def train_card(task: Task, parts: str, held: Held, *, seed: int, folder: Path) -> Card:
    """Train a LoRA on one task on top of a base, and score it on the task and on what the base knew."""
    name = f"{task.name.replace(' ', '-')}-{parts}"
    shards = folder / task.name.replace(" ", "-")
    if not shards.exists():
        rows = shards.with_suffix(".jsonl")
        numbers = range(FIRST * (seed + 1), FIRST * (seed + 1) + SAMPLES["task"])
        write_rows(rows, map(task.draw, numbers))
        moetune(f"shards build {rows} --out {shards}")
    lora = "".join(f"  {part}: {{mode: lora, r: 16, alpha: 32}}\n" for part in _LORA[parts])
    frozen = "".join(f"  {part}: {{mode: frozen}}\n" for part in ("attention", "experts") if part not in _LORA[parts])
    path = recipe(
        folder, name, model=held.model, shards=shards, steps=STEPS, rate=6e-3, adapters=f"adapters:\n{lora}{frozen}"
    )
    began = time.monotonic()
    moetune(f"train {path} --ranks 1 run.seed={seed}")
    seconds = time.monotonic() - began
    speaker = open_speaker(str(held.model), adapter=folder / "runs" / name / "adapter")
    with speaker.base_alone():
        before = score(speaker, task.draw, task.metric)
    return Card(
        task=task.name,
        parts=parts,
        seed=seed,
        metric=task.metric,
        about=task.about,
        before=before,
        after=score(speaker, task.draw, task.metric),
        kept_before=held.kept,
        kept_after=score(speaker, KEPT, "exact"),
        trained=sum(tensor.numel() for tensor in speaker.module.parameters() if tensor.requires_grad),
        steps=STEPS,
        seconds=round(seconds, 1),
    )


def score(speaker: Speaker, draw: Draw, metric: str) -> float:
    """Return the mean score on the held-out questions."""
    asked = [draw(number) for number in range(HELD_OUT)]
    measure = find_metric(metric)
    replies = answers(speaker, asked)
    return statistics.fmean(measure(reply, [trial.answer]) for reply, trial in zip(replies, asked, strict=True))

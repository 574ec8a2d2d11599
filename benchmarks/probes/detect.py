"""Trains a tiny model for one probe, from scratch by `moetune train`, and probes it; closes an expert for `balance`."""

import random
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness.tiny_runs import FULL, SIZES, moetune, recipe, write_rows
from benchmarks.probes.cases import Case
from benchmarks.probes.record import DeadExpert, Detection
from finetune.ask.open_model import open_speaker
from finetune.probes import balance
from finetune.probes.score import Score
from moe.parallel import ExpertParallelMoe

FIRST = 10**6
"""Number of the first question in training; those of a probe are far below, so that none is shown twice."""
SIDE = 64
TRIALS = 8
"""Sides and number of what `balance` shows."""


def detect(case: Case, *, seed: int, folder: Path) -> Detection:
    """Train in an empty folder, probe with and without the mechanism, and return the scores."""
    start, shards = folder / "start", folder / "shards"
    moetune(f"tiny {start} {SIZES} --seed {seed}")
    _zero(start, case.zeroed)
    numbers = range(FIRST * (seed + 1), FIRST * (seed + 1) + case.samples)
    write_rows(folder / "rows.jsonl", (case.draw(number) for number in numbers))
    moetune(f"shards build {folder / 'rows.jsonl'} --out {shards}")
    adapters = FULL.replace("merger: {mode: full}", "merger: {mode: frozen}", 1) if case.zeroed else FULL
    path = recipe(
        folder,
        "task",
        model=start,
        shards=shards,
        steps=case.steps,
        rate=case.rate,
        adapters=adapters,
        more="moe: {balance: global}\n",
    )
    began = time.monotonic()
    moetune(f"train {path} --ranks 1 run.seed={seed}")
    seconds = time.monotonic() - began
    speaker = open_speaker(str(folder / "runs" / "task" / "model"))
    scores: list[Score] = list(import_module(f"finetune.probes.{case.probe}").probe(speaker, seed=seed, **case.options))
    having, lacking = (_mean(scores, case.rows, column) for column in case.columns)
    return Detection(
        probe=case.probe,
        seed=seed,
        about=case.about,
        columns=case.columns,
        having=having,
        lacking=lacking,
        seconds=round(seconds, 1),
        scores=[asdict(score) for score in scores],
    )


def close_expert(*, seed: int, folder: Path) -> DeadExpert:
    """Give one expert of an untrained model a router logit of minus infinity, and return whom `balance` names."""
    moetune(f"tiny {folder / 'start'} {SIZES} --seed {seed}")
    speaker = open_speaker(str(folder / "start"))
    layers = [module for module in speaker.module.modules() if isinstance(module, ExpertParallelMoe)]
    draw = random.Random(f"{seed}/expert")
    layer, expert = draw.randrange(len(layers)), draw.randrange(layers[0].num_experts)

    def close(gate: object, args: object, out: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return out[0].index_fill(1, torch.tensor([expert]), -torch.inf), out[1]

    before = balance.probe(speaker, trials=TRIALS, seed=seed, side=SIDE)[0]
    with layers[layer].gate.register_forward_hook(close):
        after = balance.probe(speaker, trials=TRIALS, seed=seed, side=SIDE)[0]
    return DeadExpert(
        seed=seed,
        layer=layer,
        expert=expert,
        before=[list(experts) for experts in before.dead],
        named=[list(experts) for experts in after.dead],
    )


def _mean(scores: list[Score], rows: tuple[str, ...], column: str) -> float:
    values = [score.value for score in scores if score.row in rows and score.column == column]
    assert len(values) == len(rows)
    return sum(values) / len(values)


def _zero(folder: Path, names: tuple[str, ...]) -> None:
    """Write zeros into the tensors of a model folder whose name contains one of these."""
    if not names:
        return
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    changed = {
        name: torch.zeros_like(tensor) for name, tensor in tensors.items() if any(part in name for part in names)
    }
    assert changed, f"no tensor of {folder} is called {names}"
    save_file(tensors | changed, path, metadata={"format": "pt"})

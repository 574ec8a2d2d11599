"""Run folders with the records of every kind of run, in the forms that a run writes; lengths and names are free."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.ranks.failures import Failure, write_failure

SOURCES = ("documents", "charts")
HOSTILE = (
    "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\x1b[31m\u202e\u2028{{data}}&amp;"
)
"""A text that runs a script, follows an escape sequence or turns the writing around where it is not escaped."""


def write_run(
    folder: Path,
    *,
    steps: int = 12,
    experts: int | None = 8,
    layers: int = 3,
    load_every: int = 2,
    sources: Sequence[str] = SOURCES,
    evaluates: bool = True,
    outcome: str | None = "done",
    text: str = "It is red.",
    config: Mapping[str, Any] | None = None,
    log: Sequence[str] = (),
) -> Path:
    """Write a run of `steps` steps; `experts` is None for a dense base, `outcome` for a run that left none."""
    folder.mkdir(parents=True)
    (folder / "logs").mkdir()
    generator = np.random.default_rng(steps)
    (folder / "config.yaml").write_text(json.dumps(_config(folder, steps, sources) | dict(config or {})))
    metrics = [_step(at, steps, sources, experts, generator) for at in range(steps)]
    _write(folder / "metrics.jsonl", metrics)
    if experts is not None:
        _write(folder / "expert_load.jsonl", _loads(range(0, steps, load_every), layers, experts, sources, generator))
    if evaluates:
        _write(folder / "evaluations.jsonl", _evaluations(steps, sources))
        rows = [{"source": name, "key": "0", "question": text, "wanted": text, "finished": True} for name in sources]
        answers = {0: "?", steps: text}
        _write(
            folder / "predictions.jsonl",
            [{"step": at, "rows": [row | {"answer": answer} for row in rows]} for at, answer in answers.items()],
        )
    _write(folder / "starts.jsonl", [_start(steps, sources)])
    _samples(folder, sources, text)
    plan = {"parameters": {"total": 400, "active": 200, "trained": 100}}
    plan |= {
        "foreseen": {"weights_held": [1000, 1000], "peak_tensors": [2000, 3000]},
        "measured": {"weights_held": 1010},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    lines = [*LOG, *log]
    (folder / "logs" / "rank-0000.log").write_text(
        "".join(f"2026-11-28T13:41:{number % 60:02d}.000 {line}\n" for number, line in enumerate(lines))
    )
    if outcome is not None:
        record = {"outcome": outcome, "step": steps, "time": 0.0, "start": "here"}
        (folder / "logs" / "outcome.json").write_text(json.dumps(record))
    return folder


LOG = (
    "--- base and empty model",
    "--- data",
    "--- weights and engine",
    "from step 0: attention train",
    "--- checkpoint after 2 steps",
    "checkpoint: runs/x/checkpoints/step-000002",
    "--- writing the result",
    "adapter: runs/x/adapter",
)


def fail(folder: Path, message: str) -> None:
    """Leave the failure of a rank in a run's folder."""
    failure = Failure(rank=1, host="here", time=1.0, kind="failed", message=message, start="a start")
    write_failure(folder / "logs", failure)


def _write(path: Path, records: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> None:
    with path.open("w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def _config(folder: Path, steps: int, sources: Sequence[str]) -> dict[str, Any]:
    return {
        "run": {"name": folder.name},
        "model": {"path": "base"},
        "data": {"sources": {name: {"path": f"{number}.jsonl"} for number, name in enumerate(sources)}},
        "adapters": {"attention": {"mode": "lora"}, "merger": {"mode": "full", "lr": 1e-5}},
        "schedule": {"steps": steps, "warmup_steps": 2},
        "eval": {
            "metric": f"{sources[0]}/loss",
            "sources": {sources[0]: {"path": "held.jsonl", "guard": "flag", "max_kl": 0.5, "max_loss_rise": 0.1}},
        },
    }


def _step(
    at: int, steps: int, sources: Sequence[str], experts: int | None, generator: np.random.Generator
) -> dict[str, Any]:
    loss = 3 * float(np.exp(-3 * at / steps)) + float(generator.random()) / 10
    part = {"samples": 2, "tokens": 1000 // len(sources), "weight": 100.0, "loss": loss}
    figures = {
        "step": at,
        "epoch": 0,
        "loss": loss,
        "grad_norm": 1.0 + float(generator.random()),
        "lr": 1e-4,
        "tokens": 1024,
        "tokens_nonpad": 1000,
        "seconds": 0.5,
        "seconds_data": 0.1,
        "tokens_per_second": 2000.0,
        "mfu": None,
        "memory_gb": 1.5,
        "sources": dict.fromkeys(sources, part),
    }
    load = {
        "expert_load_max_over_mean": 2.0,
        "expert_load_entropy": 0.9,
        "experts_dead": at % 2,
        "router_agreement": 0.9,
    }
    if experts is None:
        return figures | dict.fromkeys(load)
    return figures | load | {"loss_balance": 1.2, "loss_z": 5.0}


def _loads(
    at: Sequence[int], layers: int, experts: int, sources: Sequence[str], generator: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for step in at:
        image, text = generator.integers(1, 100, (2, layers, experts))
        text[:, 0] = image[:, 0] = 0  # a dead expert in each layer
        first = (image + text) // 2
        parts = [first, image + text - first, *[np.zeros_like(first)] * len(sources)]
        yield {
            "step": step,
            "layers": list(range(layers)),
            "counts": (image + text).tolist(),
            "kinds": {"text": text.tolist(), "image": image.tolist()},
            "sources": {name: part.tolist() for name, part in zip(sources, parts, strict=False)},
        }


def _evaluations(steps: int, sources: Sequence[str]) -> Iterator[dict[str, Any]]:
    for step in dict.fromkeys((0, steps // 2, steps)):
        numbers: dict[str, Any] = {"step": step, "seconds": 0.25}
        for name in sources:
            numbers |= {f"{name}/samples": 4, f"{name}/tokens": 40, f"{name}/loss": 3 - step / steps}
            numbers |= {f"{name}/accuracy": step / steps / 2, f"{name}/kl": step / steps, f"{name}/loss_base": 3.0}
        yield numbers


def _start(steps: int, sources: Sequence[str]) -> dict[str, Any]:
    sizes = {"samples": 20, "tokens": 2000, "licences": {"CC-BY-4.0": 12, "not stated": 8}}
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    start = {"step": 0, "time": "2026-11-28T13:41:00", "steps": steps, "ranks": 2, "device": "CPU"}
    return start | {"versions": versions, "sources": dict.fromkeys(sources, sizes)}


def _samples(folder: Path, sources: Sequence[str], text: str) -> None:
    (folder / "media").mkdir()
    Image.new("RGB", (96, 64), (200, 30, 30)).save(folder / "media" / "step-000000-0.png")
    parts = [["<|im_start|>user\nWhich colour?", False], [text, True]]
    sample = {"step": 0, "tokens": 20, "supervised": 5, "parts": parts, "pictures": ["media/step-000000-0.png"]}
    _write(folder / "samples.jsonl", [sample | {"key": f"{name}/part.tar/{text}", "source": name} for name in sources])

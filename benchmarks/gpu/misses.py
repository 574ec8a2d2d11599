"""What the planner said before anything ran, beside what ran: benchmarks/results/predictions.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gpu.sizes import Assumed, Sizes, StepCase
from benchmarks.planner.predictions import PATH
from finetune.planner.gpus import gpu_like

ALLOWED = {"tokens_per_second": 0.15, "peak_bytes": 0.10}
"""How far a prediction may be off, as a share of what was measured, before it is a miss."""
LAYERS = 48
"""Of the whole 30B model."""
METRICS = {"tokens_per_second": "useful tokens/s, ", "peak_bytes": "peak memory, "}
FIELDS = ("name", "gpu", "gpus", "words", "layers", "assumed", *METRICS)


def read(path: Path) -> list[dict[str, Any]]:
    """The predictions of a file, each with all its fields; none where there is no file."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text())
    for number, one in enumerate(found):
        missing = [name for name in FIELDS if name not in one]
        if missing:
            raise ValueError(f"{path}: prediction {number} lacks {missing[0]}. Each has {', '.join(FIELDS)}")
    return found


def first_predicted(
    defaults: Sequence[StepCase], sizes: Sizes, *, gpus: int, whole: bool = False
) -> tuple[StepCase, ...]:
    """Return what was predicted for so many of this GPU, with some layers or the whole; then the other cases."""
    predicted = [
        StepCase(
            name=one["name"],
            layers=one["layers"],
            words=tuple(one["words"]),
            assumed=Assumed(**{field.name: one["assumed"][field.name] for field in fields(Assumed)}),
        )  # fmt: skip
        for one in read(PATH)
        if _is_here(one, sizes.gpu, gpus) and (one["layers"] == LAYERS) == whole
    ]
    known = {(case.layers, *sorted(case.words)) for case in predicted}
    return (*predicted, *(case for case in defaults if (case.layers, *sorted(case.words)) not in known))


def compare(
    predictions: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]], *, device: str, visible: int
) -> list[dict[str, Any]]:
    """Each prediction for this machine, what was measured of it, and whether it missed; None where it did not run."""
    found = []
    for one in predictions:
        if not any(_is_here(one, device, gpus) for gpus in (1, visible)):
            continue
        for key, prefix in METRICS.items():
            same = [
                figure["value"] for figure in figures
                if figure["metric"].startswith(prefix) and figure["config"]["layers"] == one["layers"]
                and figure["config"]["gpus"] == one["gpus"]
                and sorted(figure["config"]["words"]) == sorted(one["words"])
            ]  # fmt: skip
            measured = same[0] if same else None
            off = None if measured is None else one[key] / measured - 1
            found.append({
                "name": one["name"], "what": key, "predicted": one[key], "measured": measured, "off": off,
                "missed": None if off is None else abs(off) > ALLOWED[key],
            })  # fmt: skip
    return found


def lines(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every miss in a sentence, every prediction that did not run, and how many held."""
    said = []
    for one in compared:
        what = f"{one['name']}, {one['what']}: predicted {one['predicted']:,.5g}"
        if one["missed"] is None:
            said.append(f"did not run: {what}")
        elif one["missed"]:
            said.append(f"MISSED: {what}, measured {one['measured']:,.5g} ({one['off']:+.0%})")
    ran = [one for one in compared if one["missed"] is not None]
    return [*said, f"{sum(not one['missed'] for one in ran)} of {len(ran)} predictions for this machine held"]


def _is_here(one: Mapping[str, Any], device: str, gpus: int) -> bool:
    here = gpu_like(device)
    return here is not None and one["gpus"] == gpus and here.name.partition("-")[0] == one["gpu"].partition("-")[0]

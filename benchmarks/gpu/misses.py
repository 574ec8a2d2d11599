"""Compare measurements with the planner's earlier predictions in benchmarks/results/predictions.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gpu.sizes import Assumed, Sizes, StepCase
from benchmarks.planner.predictions import PATH
from finetune.planner.gpus import gpu_like

ALLOWED = {"tokens_per_second": 0.15, "peak_bytes": 0.10}
"""Allowed error of a prediction, relative to the measured value; a larger one is a miss."""
LAYERS = 48
"""Number of layers in the full 30B model."""
METRICS = {"tokens_per_second": "useful tokens/s, ", "peak_bytes": "peak memory, "}
FIELDS = ("name", "gpu", "gpus", "words", "layers", "assumed", *METRICS)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the predictions in a file, each with all fields; empty if the file is missing."""
    if not path.exists():
        return []
    predictions: list[dict[str, Any]] = json.loads(path.read_text())
    for number, prediction in enumerate(predictions):
        missing = [name for name in FIELDS if name not in prediction]
        if missing:
            raise ValueError(f"{path}: prediction {number} lacks {missing[0]}. Each must have {', '.join(FIELDS)}")
    return predictions


def first_predicted(
    defaults: Sequence[StepCase], sizes: Sizes, *, gpus: int, whole: bool = False
) -> tuple[StepCase, ...]:
    """Return the predicted cases for this GPU and number, with some layers or all; then the other cases."""
    predicted = [
        StepCase(
            name=prediction["name"],
            layers=prediction["layers"],
            words=tuple(prediction["words"]),
            assumed=Assumed(**{field.name: prediction["assumed"][field.name] for field in fields(Assumed)}),
        )
        for prediction in read(PATH)
        if _is_here(prediction, sizes.gpu, gpus) and (prediction["layers"] == LAYERS) == whole
    ]
    known = {(case.layers, *sorted(case.words)) for case in predicted}
    return (*predicted, *(case for case in defaults if (case.layers, *sorted(case.words)) not in known))


def compare(
    predictions: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]], *, device: str, visible: int
) -> list[dict[str, Any]]:
    """Return the predictions for this machine, each with its measured value and whether it missed (None: not run)."""
    compared = []
    for prediction in predictions:
        if not any(_is_here(prediction, device, gpus) for gpus in (1, visible)):
            continue
        for key, prefix in METRICS.items():
            same = [
                figure["value"]
                for figure in figures
                if figure["metric"].startswith(prefix)
                and figure["config"]["layers"] == prediction["layers"]
                and figure["config"]["gpus"] == prediction["gpus"]
                and sorted(figure["config"]["words"]) == sorted(prediction["words"])
            ]
            measured = same[0] if same else None
            off = None if measured is None else prediction[key] / measured - 1
            compared.append(
                {
                    "name": prediction["name"],
                    "what": key,
                    "predicted": prediction[key],
                    "measured": measured,
                    "off": off,
                    "missed": None if off is None else abs(off) > ALLOWED[key],
                }
            )
    return compared


def lines(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each miss and each prediction that did not run, and the number that held."""
    sentences = []
    for item in compared:
        what = f"{item['name']}, {item['what']}: predicted {item['predicted']:,.5g}"
        if item["missed"] is None:
            sentences.append(f"did not run: {what}")
        elif item["missed"]:
            sentences.append(f"MISSED: {what}, measured {item['measured']:,.5g} ({item['off']:+.0%})")
    ran = [item for item in compared if item["missed"] is not None]
    return [*sentences, f"{sum(not item['missed'] for item in ran)} of {len(ran)} predictions for this machine held"]


def _is_here(prediction: Mapping[str, Any], device: str, gpus: int) -> bool:
    here = gpu_like(device)
    return (
        here is not None
        and prediction["gpus"] == gpus
        and here.name.partition("-")[0] == prediction["gpu"].partition("-")[0]
    )

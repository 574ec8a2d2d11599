"""The facts of a run: what was trained on what, how it went, and the commands that continue or use it."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np

from data.format.printable import count_of, one_line, size_of
from finetune.checkpoint.folder import best_checkpoint, find_latest
from finetune.checkpoint.manifest import read_manifest
from finetune.report.curves import column, number, source_columns, source_names
from finetune.report.files import RunFiles
from finetune.report.state import State
from finetune.settings.typed import leaves

TENTH = 10
"""First and last losses are means over this part of the steps."""


def tiles(files: RunFiles) -> list[dict[str, str]]:
    """Return the few figures that stand at the top: each with a label, a value and a note."""
    metrics = files.metrics
    found = []
    losses = column(metrics, "loss")
    if len(losses):
        part = -(-len(losses) // TENTH)
        note = f"from {_mean(losses[:part]):.4g}, means of a tenth" if len(losses) > 1 else ""
        found.append({"label": "training loss", "value": f"{_mean(losses[-part:]):.4g}", "note": note})
    if best := best_of(files):
        found.append(
            {"label": f"best {best['metric']}", "value": f"{best['value']:.4g}", "note": f"step {best['step']:,}"}
        )
    rates = column(metrics, "tokens_per_second")
    if len(rates):
        middle = float(np.nanmedian(rates))
        found.append({"label": "useful tokens per second", "value": f"{middle:,.0f}", "note": "median step"})
    shares = column(metrics, "mfu")
    if np.isfinite(shares).any():
        found.append({"label": "MFU", "value": f"{float(np.nanmedian(shares)):.1%}", "note": "median step"})
    tokens = float(np.nansum(column(metrics, "tokens_nonpad"))) if metrics else 0.0
    if tokens:
        found.append({"label": "useful tokens", "value": _large(tokens), "note": f"{tokens:,.0f}"})
    seconds = sum(float(np.nansum(column(each, "seconds"))) for each in (metrics, files.evaluations) if each)
    if seconds:
        found.append(
            {"label": "time", "value": str(timedelta(seconds=round(seconds))), "note": "steps and evaluations"}
        )
    return found


def _mean(values: Any) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _large(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def facts(files: RunFiles) -> list[tuple[str, str]]:
    """Return what was trained on what, as pairs of a label and a text."""
    model, data, parallel = (files.section(name) for name in ("model", "data", "parallel"))
    start = files.starts[-1] if files.starts else {}
    parameters = files.plan.get("parameters")
    sizes = parameters if isinstance(parameters, dict) else {}
    fingerprint = _fingerprint(files.folder)
    base = str(model.get("path") or model.get("family") or "")
    found = [("base", f"{base}, fingerprint {fingerprint[:16]}" if fingerprint else base)]
    if all(isinstance(sizes.get(name), int) for name in ("total", "active", "trained")):
        trained = f"{sizes['trained']:,} of {sizes['total']:,}; one token passes through {sizes['active']:,}"
        found.append(("trained parameters", trained))
    if "dtype" in model:
        found.append(("weights", f"{model['dtype']}, attention {model.get('attention')}"))
    steps = f"{count_of(files.done, 'step')} taken" + (f" of {files.steps:,}" if files.steps else "")
    if "packs_per_step" in data:
        steps += f", {data['packs_per_step']} packs of {data.get('tokens_per_pack')} tokens each"
    found.append(("steps", steps))
    if start:
        axes = [f"{axis} {parallel[axis]}" for axis in ("ep", "sp") if axis in parallel]
        layout = ", ".join([*axes, str(start.get("device"))])
        found.append(("ranks", f"{start.get('ranks')} ({layout})"))
        versions = start.get("versions")
        if isinstance(versions, dict):
            found.append(("versions", ", ".join(f"{name} {release}" for name, release in versions.items())))
        times = [str(one.get("time", "")) for one in files.starts]
        found.append(("started", ", again ".join(time.replace("T", " ") for time in times[:4])))
    found.append(("folder", str(files.folder)))
    return [(label, one_line(text)) for label, text in found if text]


def parts(files: RunFiles) -> list[dict[str, Any]]:
    """Return a row for each part of the model that trains: its mode, rank, scale and learning rate."""
    lr = files.section("optim").get("lr")
    rows = []
    for part, settings in files.section("adapters").items():
        if isinstance(settings, dict) and settings.get("mode") not in (None, "frozen"):
            is_lora = settings.get("mode") == "lora"
            rows.append(
                {
                    "part": part,
                    "mode": settings["mode"],
                    "r": settings.get("r") if is_lora else None,
                    "alpha": settings.get("alpha") if is_lora else None,
                    "lr": settings.get("lr") or lr,
                }
            )
    return rows


def sources(files: RunFiles) -> list[dict[str, Any]]:
    """Return a row for each training source: its size, share and licences, and its first and last loss."""
    configured = files.section("data").get("sources")
    paths = (
        {name: one for name, one in configured.items() if isinstance(one, dict)} if isinstance(configured, dict) else {}
    )
    known = files.starts[-1].get("sources") if files.starts else None
    sizes = {name: one for name, one in known.items() if isinstance(one, dict)} if isinstance(known, dict) else {}
    trained = float(np.nansum(column(files.metrics, "tokens_nonpad"))) if files.metrics else 0.0
    rows = []
    for name in dict.fromkeys([*paths, *source_names(files.metrics)]):
        own = source_columns(files.metrics, name)
        licences = sizes.get(name, {}).get("licences")
        rows.append(
            {
                "name": one_line(name),
                "path": one_line(str(paths.get(name, {}).get("path", ""))),
                "weight": paths.get(name, {}).get("weight"),
                "samples": sizes.get(name, {}).get("samples"),
                "tokens": sizes.get(name, {}).get("tokens"),
                "share": float(own["tokens"].sum() / trained) if trained else None,
                "licences": one_line(", ".join(licences)) if isinstance(licences, dict) else "",
                **_losses(own),
            }
        )
    return rows


def _losses(own: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the mean loss over the first and over the last tenth of the steps, weighted as in training."""
    count = len(own["loss"])
    part = -(-count // TENTH)
    losses: dict[str, float | None] = {}
    for name, steps in (("first", slice(0, part)), ("last", slice(count - part, count))):
        known = np.isfinite(own["loss"][steps])
        weights = own["weight"][steps][known]
        losses[name] = float((own["loss"][steps][known] * weights).sum() / weights.sum()) if weights.sum() else None
    return losses


def best_of(files: RunFiles) -> dict[str, Any] | None:
    """Return the best value of eval.metric, with its step; None without a metric."""
    metric = files.section("eval").get("metric")
    values = [(number(one.get(metric)), one["step"]) for one in files.evaluations if one["step"]] if metric else []
    known = [pair for pair in values if not isnan(pair[0])]
    if not known:
        return None
    value, step = (max if str(metric).endswith("/accuracy") else min)(known)
    return {"metric": metric, "value": value, "step": step}


def evaluation(files: RunFiles) -> dict[str, Any]:
    """Return the evaluations by source and quantity, with the bounds of the guards."""
    names = list(
        dict.fromkeys(key.rpartition("/")[0] for one in files.evaluations for key in one if key.endswith("/loss"))
    )
    configured = files.section("eval").get("sources")
    settings = configured if isinstance(configured, dict) else {}
    rows = {
        name: {
            quantity: [_finite(one.get(f"{name}/{quantity}")) for one in files.evaluations]
            for quantity in ("samples", "tokens", "loss", "accuracy", "kl", "loss_base")
        }
        for name in names
    }
    guards = {
        name: {key: one.get(key) for key in ("guard", "max_kl", "max_loss_rise")}
        for name, one in settings.items()
        if isinstance(one, dict) and one.get("guard") not in (None, "none")
    }
    return {
        "x": [one["step"] for one in files.evaluations],
        "sources": rows,
        "guards": guards,
        "best": best_of(files),
    }


def _finite(value: object) -> float | None:
    known = number(value)
    return known if isfinite(known) else None


def memory(files: RunFiles) -> list[dict[str, Any]]:
    """Return a row for each size that was planned and measured."""
    foreseen, measured = (files.plan.get(name) for name in ("foreseen", "measured"))
    if not isinstance(foreseen, dict) or not isinstance(measured, dict):
        return []
    titles = {
        "weights_held": "weights on rank 0",
        "peak_tensors": "peak of tensors, fullest rows",
        "peak_tensors_of_first_rows": "peak of tensors, first rows",
    }
    rows = []
    for name, bounds in foreseen.items():
        if isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, int) for bound in bounds):
            low, high = (size_of(bound) for bound in bounds)
            value = measured.get(name)
            rows.append(
                {
                    "name": titles.get(name, name),
                    "plan": low if low == high else f"{low} to {high}",
                    "measured": size_of(value) if isinstance(value, int) else "not measured",
                }
            )
    return rows


def commands(files: RunFiles, state: State) -> list[dict[str, str]]:
    """Return the commands that continue a run or use its result."""
    found: list[tuple[str, list[str]]] = []
    folder, base = files.folder, str(files.section("model").get("path", ""))
    ranks = str(files.starts[-1].get("ranks", 1)) if files.starts else "1"
    if state.word not in ("done", "running"):
        found.append(("continue", ["moetune", "train", str(folder / "config.yaml"), "--ranks", ranks]))
    adapter, merged = _adapter(folder, files.done), folder / "merged"
    if adapter is not None:
        found.append(("merge", ["moetune", "merge", base, str(adapter), str(merged), "--verify"]))
        found.append(("ask", ["moetune", "ask", base, "What can you do?", "--adapter", str(adapter)]))
    model = folder / "model" if (folder / "model").is_dir() else merged
    if adapter is not None or (folder / "model").is_dir():
        found.append(("serve", ["moetune", "serve", str(model)]))
    return [{"label": label, "command": one_line(shlex.join(words))} for label, words in found]


def _adapter(folder: Path, done: int) -> Path | None:
    """Return the best adapter of a run, else the last one."""
    last, checkpoints = folder / "adapter", folder / "checkpoints"
    found = [last] if last.is_dir() else []
    with suppress(ValueError, OSError):  # a damaged pointer; resuming reports it
        best = best_checkpoint(checkpoints)
        if best is not None and not (found and best.name == f"step-{done:06d}"):
            found.insert(0, best / "adapter")
        newest = find_latest(checkpoints)
        found += [newest / "adapter"] if newest is not None else []
    return next((path for path in found if path.is_dir()), None)


def keys(files: RunFiles) -> dict[str, str]:
    """Return every key of the configuration with its value as text."""
    flat = leaves(json.loads(json.dumps(dict(files.config), default=str)))
    return {one_line(key): one_line(json.dumps(value, ensure_ascii=False)) for key, value in flat.items()}


def differing(all_keys: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys whose values are not the same in all runs, with the value of each."""
    for key in dict.fromkeys(key for keys_of_run in all_keys for key in keys_of_run):
        values = [keys_of_run.get(key, "") for keys_of_run in all_keys]
        is_set = any(value not in ("", "null") for value in values)
        if is_set and len(set(values)) > 1 and key != "run.name":
            yield key, values


def _fingerprint(folder: Path) -> str:
    """Return the fingerprint of the base that the newest checkpoint names; "" without a checkpoint."""
    try:
        newest = find_latest(folder / "checkpoints")
        return "" if newest is None else read_manifest(newest).base_fingerprint
    except (ValueError, OSError):
        return ""

"""The summary at the end of a run: its duration, its losses by source, its adapters, and the next commands.

All of it is read from the run's folder, so that the summary of an interrupted run covers all its starts.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.format.printable import count_of
from finetune.checkpoint.adapter import FOLDER
from finetune.checkpoint.folder import best_checkpoint
from finetune.config import RunConfig
from finetune.tracking.metrics import SourceSums
from finetune.tracking.progress_bar import duration
from finetune.tracking.records import records

PART = 10
"""Losses by source are shown for the first and the last of this many parts of the steps."""
COLUMNS = ("source", "samples", "tokens", "first loss", "last loss")


def work_line(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], *, done: int) -> str:
    """Describe the time and the tokens of the steps of all starts."""
    seconds, judged = (sum(float(one["seconds"]) for one in each) for each in (steps, evaluations))
    tokens = sum(one["tokens_nonpad"] for one in steps)
    known = (
        "" if len(steps) == done else f" (of {count_of(len(steps), 'step')}: the records of the others were damaged)"
    )
    evaluated = f", evaluations in {duration(judged)}" if judged else ""
    return f"{count_of(done, 'step')} in {duration(seconds)}{evaluated}; {tokens:,} useful tokens{known}"


def source_lines(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the samples, tokens and losses by source."""
    part = -(-len(steps) // PART)
    everything, first, last = (_sums(some) for some in (steps, steps[:part], steps[-part:]))
    rows = [COLUMNS]
    for name, sums in sorted(everything.items()):
        rows.append((name, f"{sums.samples:,}", f"{sums.tokens:,}", _mean(first.get(name)), _mean(last.get(name))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return [*lines, "the losses are means over the first and the last tenth of the steps"] if len(rows) > 1 else []


def _sums(steps: Sequence[Mapping[str, Any]]) -> dict[str, SourceSums]:
    sums: dict[str, SourceSums] = {}
    for step in steps:
        for name, figures in step.get("sources", {}).items():
            of_step = SourceSums(**figures | {"loss": (figures["loss"] or 0.0) * figures["weight"]})
            sums[name] = sums.get(name, SourceSums()) + of_step
    return sums


def _mean(sums: SourceSums | None) -> str:
    return f"{sums.loss / sums.weight:.4f}" if sums is not None and sums.weight else "-"


def evaluation_lines(evaluations: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[str]:
    """Return a line with the loss of each held-out source, and one with the metric that chose the best adapter."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    after = f"after {count_of(last['step'], 'step')}"
    names = [name for name in last if name.endswith("/loss")]
    lines = [f"evaluation, {name}: {first[name]:.4f} at first, {last[name]:.4f} {after}" for name in names]
    if best:
        metric, at = best["metric"], count_of(best["step"], "step")
        lines.append(f"metric, {metric}: best {best['value']:.4f} after {at}, last {last[metric]:.4f} {after}")
    return lines


def summary(config: RunConfig, folder: Path, *, done: int, best: Mapping[str, Any], ending: str) -> list[str]:
    """Return the summary of a run that ended after `done` steps; `ending` says why, `best` is the best metric."""
    steps, evaluations = records(folder / "metrics.jsonl"), records(folder / "evaluations.jsonl")
    lines = [f"{ending}: {work_line(steps, evaluations, done=done)}", *source_lines(steps)]
    lines += evaluation_lines(evaluations, best)
    last, merged = folder / "adapter", folder / "merged"
    if not last.exists():
        return [*lines, f"model: {folder / 'model'}", "next:", _ask(config, folder / "model")]
    chosen, at = _best_adapter(folder), f"after {count_of(done, 'step')}"
    if chosen is None or best["step"] == done:
        lines.append(f"adapter, last{'' if chosen is None else ' and best'}: {last}, {at}")
        chosen = last
    else:
        lines.append(f"adapter, last: {last}, {at}")
        lines.append(f"adapter, best: {chosen}, after {count_of(best['step'], 'step')}")
    merge = ["moetune", "merge", config.model.path, str(chosen), str(merged), "--verify"]
    return [*lines, "next:", f"  {shlex.join(merge)}", _ask(config, merged)]


def _best_adapter(folder: Path) -> Path | None:
    best = best_checkpoint(folder / "checkpoints")
    return best / FOLDER if best is not None and (best / FOLDER).exists() else None


def _ask(config: RunConfig, model: Path) -> str:
    """Return the command that tries the model, with the held-out sources or with a question."""
    sources = config.eval.sources
    named = [source.path if len(sources) == 1 else f"{name}={source.path}" for name, source in sources.items()]
    words = ["eval", *named, "--model", str(model)] if named else ["ask", str(model), "What can you do?"]
    return f"  {shlex.join(['moetune', *words])}"

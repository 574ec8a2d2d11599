"""The list of the runs in a folder: state, step, best metric, base, size, and why a run did not finish."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.format.printable import one_line, size_of
from finetune.report.facts import best_of
from finetune.report.files import RunFiles, is_run, last_record, read_config, records
from finetune.report.state import State, state_of

COLUMNS = ("run", "state", "step", "best metric", "base", "size")
MESSAGE_CHARACTERS = 300
"""The most characters of a message that are shown."""


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run of the list."""

    name: str
    state: State
    step: str
    best: str
    base: str
    bytes: int
    time: float
    """When its records changed last."""


def run_lines(folder: Path) -> list[RunLine]:
    """Return the runs in a folder, the latest first; raise ValueError if it has none."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder. Give the folder of your runs, which is `runs` unless run.folder is set"
        )
    runs = [_line(path) for path in folder.iterdir() if path.is_dir() and is_run(path)]
    if not runs:
        raise ValueError(
            f"{folder} has no runs: none of its folders has a config.yaml or metrics.jsonl of `moetune train`"
        )
    return sorted(runs, key=lambda run: run.time, reverse=True)


def _line(folder: Path) -> RunLine:
    config, last = read_config(folder), last_record(folder / "metrics.jsonl")
    start = last_record(folder / "starts.jsonl")
    files = RunFiles(
        folder=folder,
        config=config,
        plan={},
        metrics=[last] if isinstance(last.get("step"), int) else [],
        evaluations=records(folder / "evaluations.jsonl"),
        predictions=(),
        loads=(),
        samples=(),
        starts=[start] if start else [],
        log=(),
    )
    best = best_of(files)
    stamps = [path.stat().st_mtime for name in ("metrics.jsonl", "config.yaml") if (path := folder / name).exists()]
    return RunLine(
        name=one_line(folder.name),
        state=state_of(folder, stall_seconds=files.section("run").get("stall_seconds")),
        step=f"{files.done:,}" + (f" of {files.steps:,}" if files.steps else ""),
        best=one_line(f"{best['metric']} {best['value']:.4g}, step {best['step']:,}") if best else "-",
        base=one_line(str(files.section("model").get("path") or "-")),
        bytes=sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()),
        time=max(stamps),
    )


def table(runs: Sequence[RunLine]) -> Iterator[str]:
    """Yield the lines of the list; a message stands below its run."""
    rows = [
        COLUMNS,
        *((run.name, run.state.word, run.step, run.best, run.base, size_of(run.bytes)) for run in runs),
    ]
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    for row, run in zip(rows, [None, *runs], strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if run is not None and run.state.message:
            yield f"  {one_line(run.state.message.splitlines()[0])[:MESSAGE_CHARACTERS]}"

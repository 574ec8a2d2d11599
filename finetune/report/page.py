"""Puts the report together: one HTML file that holds its data and its scripts, within its size."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files as package_files
from math import isfinite
from pathlib import Path
from typing import Any

from data.format.printable import one_line, printable
from finetune.files.atomic import write_file
from finetune.ranks.versions import installed_versions
from finetune.report.curves import curves
from finetune.report.events import events, phases
from finetune.report.facts import commands, differing, evaluation, facts, keys, memory, parts, sources, tiles
from finetune.report.files import RunFiles, read_run_files
from finetune.report.load import EVEN, load
from finetune.report.samples import answers, samples
from finetune.report.state import State, state_of

MOST_BYTES = 5_000_000
"""The largest size of a report."""
NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class Room:
    """The size of the parts of a report that can be made smaller: for each of its runs."""

    points: int
    load_bytes: int
    picture_bytes: int

    @classmethod
    def of(cls, runs: int, *, shrunk: int = 1) -> "Room":
        """Return the room of each of `runs` runs in a report that is `shrunk` that many times."""
        share = runs * shrunk
        return cls(points=max(50, 1500 // share), load_bytes=1_500_000 // share, picture_bytes=1_000_000 // share)


def write_report(folders: Sequence[Path], out: Path | None = None, *, refresh: int = 0) -> Path:
    """Write the report of these runs, beside the records of a single one, and return its path.

    With `refresh`, a browser loads it again after that many seconds.
    """
    runs = [read_run_files(folder) for folder in folders]
    path = out or folders[0] / NAME
    beside = path.with_name(f"{path.name}.partial")
    write_file(beside, report(runs, refresh=refresh).encode())
    beside.replace(path)
    return path


def try_report(folder: Path) -> str:
    """Write the report of a run that ends, and return a sentence about it: a report never fails a run."""
    try:
        return f"report: {write_report([folder])}"
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        return (
            f"warning: no report was written ({type(error).__name__}: {error}); `moetune report {folder}` tries again"
        )


def report(runs: Sequence[RunFiles], *, refresh: int = 0) -> str:
    """Return the page of these runs; long curves, the heatmap and pictures shrink until it fits."""
    shrunk, text = 1, ""
    while not text or (len(text) > MOST_BYTES and shrunk < 64):
        text = _page(_content(runs, Room.of(len(runs), shrunk=shrunk)), refresh=refresh)
        shrunk *= 2
    return text


def _content(runs: Sequence[RunFiles], room: Room) -> dict[str, Any]:
    shown = [_run(files, room) for files in runs]
    return {
        "version": installed_versions(["moetune"]).get("moetune", "(from source)"),
        "written": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "even": EVEN,
        "runs": shown,
        "differing": list(differing([run["keys"] for run in shown])) if len(shown) > 1 else [],
    }


def _run(files: RunFiles, room: Room) -> dict[str, Any]:
    state: State = state_of(files.folder, stall_seconds=files.section("run").get("stall_seconds"))
    return {
        "name": one_line(files.name),
        "base": one_line(str(files.section("model").get("path", ""))),
        "state": {"word": state.word, "message": state.message},
        "done": files.done,
        "steps": files.steps,
        "tiles": tiles(files),
        "facts": facts(files),
        "parts": parts(files),
        "sources": sources(files),
        "commands": commands(files, state),
        "curves": curves(files, points=room.points),
        "load": load(files, most_bytes=room.load_bytes),
        "evaluation": evaluation(files),
        "memory": memory(files),
        "phases": phases(files),
        "samples": samples(files, picture_bytes=room.picture_bytes),
        "answers": answers(files),
        "events": events(files),
        "keys": keys(files),
    }


def _page(content: dict[str, Any], *, refresh: int) -> str:
    """Return the page; in its data no character can end the script that holds them."""
    data = json.dumps(_shown(content), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = _asset("report.html")
    for name in ("uplot.css", "report.css", "uplot.js", "report.js"):
        page = page.replace(f"{{{{{name}}}}}", _asset(name))
    if refresh:
        page = page.replace("</title>", f'</title>\n<meta http-equiv="refresh" content="{refresh}">')
    return page.replace("{{data}}", data)


def _shown(value: Any) -> Any:
    """Return the content as JSON can hold it and a page can show it.

    Numbers that are not finite become None, and control characters of names and texts become numbers.
    """
    if isinstance(value, dict):
        return {printable(key): _shown(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not isfinite(value) else value


def _asset(name: str) -> str:
    return (package_files("finetune") / "assets" / "report" / name).read_text(encoding="utf-8")

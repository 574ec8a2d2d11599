"""Reads a run's folder as far as it can be read: a report must not depend on a clean end."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

MOST_BYTES = 64 * 2**20
"""Bytes that are read of a file of records; of a larger one, lines spread over all of it are read."""
MOST_LOG_BYTES = 16 * 2**20
"""Bytes that are read from the end of the log."""

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The records in a run's folder; what is missing or damaged is empty."""

    folder: Path
    config: Record
    plan: Record
    metrics: Sequence[Record]
    evaluations: Sequence[Record]
    predictions: Sequence[Record]
    loads: Sequence[Record]
    samples: Sequence[Record]
    starts: Sequence[Record]
    log: Sequence[str]

    @property
    def name(self) -> str:
        """The name of the run, which is that of its folder."""
        return self.folder.resolve().name

    @property
    def done(self) -> int:
        """The number of steps that are recorded."""
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0

    @property
    def steps(self) -> int:
        """The number of steps of the schedule; 0 if it is unknown."""
        planned = self.starts[-1].get("steps") if self.starts else self.section("schedule").get("steps")
        return planned if isinstance(planned, int) else 0

    def section(self, name: str) -> Record:
        """Return a section of the configuration."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def read_run_files(folder: Path) -> RunFiles:
    """Read the folder of a run; raise ValueError if it is none."""
    if not is_run(folder):
        raise ValueError(
            f"{folder} is not the folder of a run: it has neither config.yaml nor metrics.jsonl. Name a folder that "
            f"`moetune train` has written, such as runs/NAME"
        )
    return RunFiles(
        folder=folder,
        config=read_config(folder),
        plan=read_object(folder / "plan.json"),
        metrics=records(folder / "metrics.jsonl"),
        evaluations=records(folder / "evaluations.jsonl"),
        predictions=records(folder / "predictions.jsonl"),
        loads=records(folder / "expert_load.jsonl"),
        samples=records(folder / "samples.jsonl"),
        starts=records(folder / "starts.jsonl"),
        log=_log_lines(folder / "logs" / "rank-0000.log"),
    )


def read_config(folder: Path) -> Record:
    """Return a run's effective configuration; empty if it cannot be read."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def read_object(path: Path) -> Record:
    """Return the JSON object in a file; empty if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def records(path: Path) -> list[Record]:
    """Return the records of a file that belong to a step, in their order; damaged lines are left out."""
    found: list[Record] = []
    for line in spread_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def last_record(path: Path) -> Record:
    """Return the last complete record of a file; empty if there is none. Only the end of the file is read."""
    for line in reversed(_tail(path, 2**20).splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            return record
    return {}


def spread_lines(path: Path, most: int = MOST_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file; of one larger than `most` bytes, lines spread evenly over it, and the last line."""
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError:
        return
    skipped = max(0.0, size / most - 1)  # bytes left out for each byte read
    with file:
        while line := file.readline():
            yield line
            if skipped:
                file.seek(int(len(line) * skipped), os.SEEK_CUR)
                file.readline()
    if skipped:
        yield from _tail(path, 2**20).splitlines()[-1:]


def _tail(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(-min(most, path.stat().st_size), os.SEEK_END)
            return file.read()
    except OSError:
        return b""


def _log_lines(path: Path) -> list[str]:
    return _tail(path, MOST_LOG_BYTES).decode(errors="replace").splitlines()

"""The records in a run's folder: one JSON object per line, for a step or an evaluation."""

import json
from pathlib import Path
from typing import Any

from finetune.files.atomic import write_file


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, or none if it is missing; `forget_steps` must have cleaned it before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def forget_steps(path: Path, steps: int) -> int:
    """Drop lines of steps from `steps` on, which an earlier start took after its last checkpoint, and damaged lines.

    Returns the number of damaged lines. The last line does not count: it may be cut off because that start was killed.
    """
    if not path.exists():
        return 0
    *lines, _ = path.read_bytes().split(b"\n")
    numbers = [_step_of(line) for line in lines]
    beside = path.with_name(f"{path.name}.partial")
    write_file(
        beside, b"".join(line + b"\n" for line, number in zip(lines, numbers, strict=True) if 0 <= number < steps)
    )
    beside.replace(path)
    return numbers.count(-1)


def _step_of(line: bytes) -> int:
    """Return the step that a line is about; -1 if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return step if isinstance(step, int) else -1

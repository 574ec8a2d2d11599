"""Writes a run's figures as TensorBoard's files: `tensorboard/train` by step, `tensorboard/eval` by steps done.

Every start writes new files. They mark steps in earlier files as void if this start takes them again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"
NAMES = {"metrics": "train", "evaluations": "eval"}
"""The kinds of records that become curves, and TensorBoard's name for each."""


class TensorBoard:
    """The writers of one start; `begins` has the step from which earlier records are void, by kind of record."""

    def __init__(self, folder: Path, begins: Mapping[str, int]) -> None:
        self._writers = {
            kind: SummaryWriter(str(folder / FOLDER / name), purge_step=begins[kind]) for kind, name in NAMES.items()
        }

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write every number of a record; kinds of records without a curve are ignored."""
        if writer := self._writers.get(kind):
            for name, value in numbers(values):
                writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Write the rest, and close the files."""
        for writer in self._writers.values():
            writer.close()


def numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each number of a record by its name, of a source as `source/<name>/<quantity>`; leave the step out."""
    for name, value in values.items():
        if name == "sources":
            for source, of_source in value.items():
                yield from ((f"source/{source}/{key}", number) for key, number in numbers(of_source))
        elif name != "step" and value is not None:
            yield name, value

"""Bad steps: one that is not finite is saved for a replay, and a run that learns nothing is stopped."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from math import isfinite
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.format.printable import count_of
from data.stream.batch import Batch
from finetune.checkpoint.checkpoints import Checkpoints
from finetune.ranks.collectives import barrier, rank_and_world
from finetune.ranks.engine import NotFinite
from finetune.settings.recipes import effective
from finetune.training.setup import Run

REPLAY = "replay"


def require_finite(losses: Mapping[str, float], step: int) -> None:
    """Raise unless every loss of a step is finite. The losses are sums over ranks, so all ranks raise together."""
    wrong = [f"{name} is {value}" for name, value in losses.items() if not isfinite(value)]
    if wrong:
        raise NotFinite(f"step {step}: {', '.join(wrong)}; the weights are those of the step before")


class IdleSteps:
    """Counts successive steps that teach nothing: a loss of exactly zero, or no supervised token."""

    def __init__(self, allowed: int) -> None:
        self._allowed, self._steps = allowed, list[int]()

    def see(self, step: int, loss: float, keys: Sequence[str]) -> None:
        """Raise after too many such steps; `loss` must be the same on every rank, `keys` name this rank's samples."""
        self._steps = [*self._steps, step] if loss == 0 else []
        if len(self._steps) >= self._allowed:
            raise ValueError(
                f"steps {self._steps[0]} to {step}: the loss was exactly zero, or no token was supervised, in "
                f"{self._allowed} steps in a row (run.idle_steps). Samples of the last step on this rank: "
                f"{', '.join(keys[:4]) or 'none'}. Check the supervised tokens with `moetune shards show`"
            )


@contextmanager
def saved_if_not_finite(run: Run, step: int, batches: Sequence[Batch]) -> Iterator[None]:
    """Save the step that the block takes for a replay, if it is not finite; the error then says how to replay it.

    Every rank must enter this.
    """
    random = _random_states()
    try:
        yield
    except NotFinite as error:
        run.watch.stage("saving a step that is not finite")
        folder = _saved_step(run, step, batches, random, reason=str(error))
        raise NotFinite(
            f"{error}. Its rows and the weights before it are saved: the same command with --replay {folder} names the "
            f"first module with a value that is not finite. Then lower the learning rate, or leave the sample out"
        ) from error


def _random_states() -> dict[str, Tensor]:
    """Return this rank's random states before a step, so that dropout is the same in a replay."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _saved_step(run: Run, step: int, batches: Sequence[Batch], random: Mapping[str, Tensor], *, reason: str) -> Path:
    """Save the rows of a step, and the weights before it, in a folder; every rank must call this."""
    checkpoints = Checkpoints(run.engine, run.empty, run.folder / "replay", base=run.base_files, keep=1)
    folder = checkpoints.save(step=step, state={REPLAY: reason}, config=effective(run.config))
    rows_folder = folder / "rows"
    rows_folder.mkdir(exist_ok=True)
    tensors = {name: state.contiguous() for name, state in random.items()}
    rows = []
    for number, batch in enumerate(batches):
        values = {item.name: getattr(batch, item.name) for item in fields(batch)}
        tensors |= {
            f"{number}.{name}": value.contiguous() for name, value in values.items() if isinstance(value, Tensor)
        }
        rows.append({"keys": batch.keys, "max_length": batch.max_length})
    path = rows_folder / f"rank-{rank_and_world()[0]:04d}.safetensors"
    save_file(tensors, path, metadata={"rows": json.dumps(rows), "step": str(step)})
    barrier()
    return folder


def saved_rows(folder: Path, ranks: int | None = None) -> list[Batch]:
    """Return the rows of all ranks of a saved step, in order; with `ranks`, raise unless this many ranks saved it."""
    files = sorted((folder / "rows").glob("rank-*.safetensors"))
    if ranks is not None and len(files) != ranks:
        raise ValueError(
            f"--replay {folder}: {count_of(len(files), 'rank')} saved it, and with parallel.sp as many must replay "
            f"it, got {ranks}"
        )
    if not files:
        raise ValueError(
            f"--replay {folder}: there is no rows/ in it. Name the folder in which a stopped run saved its step"
        )
    batches = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for number, row in enumerate(json.loads(opened.metadata()["rows"])):
                stored_names = opened.keys()  # the opened file itself has no `in`
                names = [name for name in stored_names if name.startswith(f"{number}.")]
                tensors = {name.partition(".")[2]: opened.get_tensor(name) for name in names}
                batches.append(Batch(**tensors, keys=tuple(row["keys"]), max_length=row["max_length"]))
    return batches


def restore_random(folder: Path) -> None:
    """Set this rank's random states to those of the saved step, if this rank took part in it."""
    file = folder / "rows" / f"rank-{rank_and_world()[0]:04d}.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as opened:
            torch.set_rng_state(opened.get_tensor("random.cpu"))
            stored_names = opened.keys()  # the opened file itself has no `in`
            if torch.cuda.is_available() and "random.cuda" in stored_names:
                torch.cuda.set_rng_state(opened.get_tensor("random.cuda"))

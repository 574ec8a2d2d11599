"""A step that must not be taken: it is kept for replay, and a run that learns nothing is stopped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.stream.batch import Batch
from finetune.checkpoint.checkpoints import Checkpoints
from finetune.ranks.collectives import barrier, rank_and_world
from finetune.ranks.engine import NotFinite

REPLAY = "replay"


def require_finite(found: Mapping[str, float], step: int) -> None:
    """Raise unless every loss of a step is finite; these are reduced, so every rank finds the same."""
    wrong = [f"{name} is {value}" for name, value in found.items() if not isfinite(value)]
    if wrong:
        raise NotFinite(f"step {step}: {', '.join(wrong)}; the weights are those of the step before")


class IdleSteps:
    """Counts steps in a row that teach nothing: a loss of exactly zero, or not one supervised token."""

    def __init__(self, allowed: int) -> None:
        self._allowed, self._steps = allowed, list[int]()

    def see(self, step: int, loss: float, keys: Sequence[str]) -> None:
        """Raise when there were too many; give it what is the same on every rank, and this rank's samples to name."""
        self._steps = [*self._steps, step] if loss == 0 else []
        if len(self._steps) >= self._allowed:
            raise ValueError(
                f"steps {self._steps[0]} to {step}: the loss was exactly zero, or no token was supervised, in "
                f"{self._allowed} steps in a row (run.idle_steps). Samples of the last, on this rank: "
                f"{', '.join(keys[:4]) or 'none'}. Look at what is supervised with `moetune shards show`"
            )


def random_states() -> dict[str, Tensor]:
    """This rank's random states, as a step begins: dropout is the same in a replay."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def keep_for_replay(
    checkpoints: Checkpoints, batches: Sequence[Batch], random: Mapping[str, Tensor], *, step: int,
    config: Mapping[str, Any], why: str,
) -> Path:  # fmt: skip
    """Write the rows of a step, and the weights before it, into a folder; every rank must call this."""
    folder = checkpoints.save(step=step, state={REPLAY: why}, config=config) / "rows"
    rank, _ = rank_and_world()
    folder.mkdir(exist_ok=True)
    tensors = {name: state.contiguous() for name, state in random.items()}
    said = []
    for number, batch in enumerate(batches):
        parts = {item.name: getattr(batch, item.name) for item in fields(batch)}
        tensors |= {f"{number}.{name}": part.contiguous() for name, part in parts.items() if isinstance(part, Tensor)}
        said.append({"keys": batch.keys, "max_length": batch.max_length})
    save_file(tensors, folder / f"rank-{rank:04d}.safetensors", metadata={"rows": json.dumps(said), "step": str(step)})
    barrier()
    return folder.parent


def kept_step(
    error: NotFinite, checkpoints: Checkpoints, batches: Sequence[Batch], random: Mapping[str, Tensor], step: int,
    config: Mapping[str, Any],
) -> NotFinite:  # fmt: skip
    """Keep a step that is not finite, and return its error with the way to look into it; every rank must call this."""
    kept = keep_for_replay(checkpoints, batches, random, step=step, config=config, why=str(error))
    return NotFinite(
        f"{error}. Its rows and the weights before it are kept: the same command with --replay {kept} names the first "
        f"module that is not finite. Then lower the learning rate, or leave the sample out"
    )


def kept_rows(folder: Path, ranks: int | None = None) -> list[Batch]:
    """Return the rows of all ranks of a kept step, in their order; of so many ranks, where their number matters."""
    files = sorted((folder / "rows").glob("rank-*.safetensors"))
    if ranks is not None and len(files) != ranks:
        raise ValueError(f"--replay {folder}: parallel.sp wants the {len(files)} ranks that kept it, not {ranks}")
    if not files:
        raise ValueError(f"--replay {folder}: it holds no rows/. Name a folder that a stopped run said it kept")
    found = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for number, said in enumerate(json.loads(opened.metadata()["rows"])):
                held = opened.keys()
                names = [name for name in held if name.startswith(f"{number}.")]
                parts = {name.partition(".")[2]: opened.get_tensor(name) for name in names}
                found.append(Batch(**parts, keys=tuple(said["keys"]), max_length=said["max_length"]))
    return found


def restore_random(folder: Path) -> None:
    """Set this rank's random states to those of the kept step, where it had this rank."""
    file = folder / "rows" / f"rank-{rank_and_world()[0]:04d}.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as opened:
            torch.set_rng_state(opened.get_tensor("random.cpu"))
            held = opened.keys()  # the file itself is no container
            if torch.cuda.is_available() and "random.cuda" in held:
                torch.cuda.set_rng_state(opened.get_tensor("random.cuda"))

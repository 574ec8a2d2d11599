"""Trains tiny models as a user would: rows and media in files, shards, and `moetune` commands."""

import hashlib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from finetune.probes.trial import Trial
from launchers.cli import main

SIZES = (
    "--layers 3 --hidden 64 --head-dim 32 --expert-hidden 96 --vision-depth 2 --vision-hidden 64 "
    "--vision-intermediate 128 --vision-heads 4 --image-min-tokens 4"
)
"""The sizes of the model of `moetune demo`."""
FULL = """\
adapters:
  attention: {mode: full}
  experts: {mode: full}
  router: {mode: full}
  vision_blocks: {mode: full}
  merger: {mode: full}
  deepstack_mergers: {mode: full}
  patch_embed: {mode: full}
  pos_embed: {mode: full}
  norms: {mode: full}
  embeddings: {mode: full}
  head: {mode: full}
"""
"""Every weight trains."""


def moetune(words: str) -> None:
    """Run one command; raise RuntimeError if it fails."""
    code = main(shlex.split(words))
    if code:
        raise RuntimeError(f"`moetune {words}` ended with exit code {code}")


def write_rows(path: Path, trials: Iterable[Trial]) -> None:
    """Write questions with their answers as a file of rows, and each medium once, in a folder beside it."""
    media = path.with_suffix("")
    media.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for trial in trials:
            shown = [*trial.images, *(frame for clip in trial.clips for frame in clip.frames)]
            row = trial.row([str(_stored(data, media)) for data in shown])
            row["messages"].append({"role": "assistant", "content": trial.answer})
            file.write(json.dumps(row) + "\n")


def _stored(data: bytes, folder: Path) -> Path:
    path = folder.absolute() / f"{hashlib.sha256(data).hexdigest()[:16]}.png"
    if not path.exists():
        path.write_bytes(data)
    return path


def recipe(
    folder: Path, name: str, *, model: Path, shards: Path, steps: int, rate: float, adapters: str = FULL, more: str = ""
) -> Path:
    """Write the recipe of a run on one rank, and return its path."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"model: {{path: {model}, dtype: float32}}\n{adapters}"
        f"parallel: {{ep: 1, recompute: none}}\n"
        f"data: {{packs_per_step: 1, tokens_per_pack: 4096, workers: 0, sources: {{task: {{path: {shards}}}}}}}\n"
        f"optim: {{lr: {rate}}}\n"
        f"schedule: {{steps: {steps}, warmup_steps: {max(10, steps // 10)}}}\n"
        f"checkpoint: {{every_steps: 0}}\n"
        f"run: {{name: {name}, folder: {folder / 'runs'}}}\n{more}"
    )
    return path

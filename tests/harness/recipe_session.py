"""The ranks of the recipe tests: a complete run of each shipped recipe, and one that resumes halfway."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from finetune.train import main

SAVED_AT = 1


def runs(rank: int, world: int, jobs: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Return both exit codes by recipe: `<recipe>` runs to the end, `<recipe>-again` resumes one of its checkpoints."""
    codes = {}
    for recipe, words in jobs.items():
        codes[recipe] = [main([recipe, f"run.name={recipe}", *words])]
        saved, again = Path(f"runs/{recipe}/checkpoints/step-{SAVED_AT:06d}"), f"{recipe}-again"
        if rank == 0:
            shutil.copytree(saved, Path(f"runs/{again}/checkpoints/{saved.name}"))
        dist.barrier()
        words = [*words, f"checkpoint.resume=runs/{again}/checkpoints/{saved.name}"]
        codes[recipe].append(main([recipe, f"run.name={again}", *words]))
    return codes

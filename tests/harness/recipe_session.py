"""What ranks do for the tests of the shipped recipes: a whole run of each, and one that goes on from its middle."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from finetune.train import main

SAVED_AT = 1


def runs(rank: int, world: int, jobs: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """By recipe, the exit codes of both runs: `<recipe>` to the end, `<recipe>-again` from a checkpoint of it."""
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

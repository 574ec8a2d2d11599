"""The ranks of the tests of a run's length: runs one after the other, some from a checkpoint of an earlier one."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from finetune.train import main

Job = tuple[str, Sequence[str], str]
"""The name of a run, its words, and the checkpoint to put into its folder first; empty: none."""


def runs(rank: int, world: int, jobs: Sequence[Job]) -> list[int]:
    """Their exit codes."""
    codes = []
    for name, words, checkpoint in jobs:
        if rank == 0 and checkpoint:
            shutil.copytree(checkpoint, Path("runs") / name / "checkpoints" / Path(checkpoint).name)
        dist.barrier()
        codes.append(main(["tiny-cpu", f"run.name={name}", f"parallel.ep={world}", *words]))
    return codes

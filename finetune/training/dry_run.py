"""`--dry-run`: all that a run does, once: checks, shards, one real step, a checkpoint, an adapter; nothing stays.

The step is the run's own, in a folder beside the run's that is removed: what would fail later, for memory, for the disk
or for the data, fails now.
"""

import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.open import find_sources
from data.prepare.audit import AuditOptions, Finding, audit_shards
from finetune.config import CheckpointConfig, EvalConfig, RunConfig, TrackConfig
from finetune.ranks.collectives import barrier, gather_lists, rank_and_world
from finetune.ranks.engine import engine_device
from finetune.ranks.failures import keep_outcome
from finetune.ranks.log import RankLog
from finetune.ranks.watch import Watch

SHOWN = 20


def rehearse(
    config: RunConfig, folder: Path, train: Callable[[RunConfig, Path, RankLog, Watch], int], say: RankLog, watch: Watch
) -> int:
    """Do one step of the run and leave nothing; every rank must call this. Returns 3 where shards have problems."""
    rank, _ = rank_and_world()
    place = folder.with_name(f"{folder.name}.dry-run")
    if rank == 0:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    barrier()
    try:
        findings = _look_at_shards(config)
        say(_said(findings))
        if not findings:
            train(_one_step(config), place, say, watch)
            say("\n".join(memory_lines()))
            say("dry run: passed; nothing of it is kept")
        barrier()  # or the folder would go while another rank still writes
    finally:
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    if rank == 0 and findings:
        keep_outcome(say, "problems", 0)
    elif rank == 0:
        shutil.rmtree(say.folder)
    return 3 if findings else 0


def memory_lines() -> list[str]:
    """Say the largest memory that each rank had; every rank must call this."""
    device = engine_device()
    rank, _ = rank_and_world()
    if device.type == "cuda":
        mine = (rank, torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory)
        what = "of the device's"
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mine = (rank, peak * (1 if sys.platform == "darwin" else 1024), 0)
        what = "of the process"
    lines = []
    for number, used, total in sorted(gather_lists([mine])):
        there = f" {total / 2**30:.2f} GiB" if total else ""
        lines.append(f"memory of rank {number}: at most {used / 2**30:.2f} GiB {what}{there}")
    return lines


def _one_step(config: RunConfig) -> RunConfig:
    """The run's first step, from the base; what others would see of it is left out."""
    return replace(
        config,
        schedule=replace(config.schedule, steps=1),
        checkpoint=CheckpointConfig(resume="never"),
        eval=EvalConfig(),
        track=TrackConfig(),
    )


def _look_at_shards(config: RunConfig) -> list[Finding]:
    """What is wrong with the shards by their headers, found by rank 0 and told to all."""
    found: list[Finding] = []
    if rank_and_world()[0] == 0:
        cache = Path(config.data.cache_dir) if config.data.cache_dir else None
        options = AuditOptions(decode=False, cache_dir=cache)
        for shards in find_sources(config.data).values():
            found += audit_shards(shards, options)
    return gather_lists(found)


def _said(findings: Sequence[Finding]) -> str:
    if not findings:
        return "shards: every header is sound; `moetune shards check` looks at every pixel too"
    lines = [f"shards: {len(findings)} problems", *(f"  {finding}" for finding in findings[:SHOWN])]
    return "\n".join([*lines, *(["  ..."] if len(findings) > SHOWN else [])])

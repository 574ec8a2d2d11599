"""`--dry-run`: all that a run does, once: checks, shards, one real step, a checkpoint, an adapter; nothing stays.

The step is the run's own, in a folder beside the run's that is removed: what would fail later because of memory, the
disk or the data, fails now.
"""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
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
    dry_folder = folder.with_name(f"{folder.name}.dry-run")
    if rank == 0:
        shutil.rmtree(dry_folder, ignore_errors=True)
        dry_folder.mkdir(parents=True)
    barrier()
    try:
        findings = _look_at_shards(config)
        say("\n".join(_finding_lines(findings)))
        if not findings:
            train(_one_step(config), dry_folder, say, watch)
            say("\n".join(memory_lines()))
            say("dry run: passed; nothing of it is kept")
        barrier()  # or the folder would go while another rank still writes
    finally:
        if rank == 0:
            shutil.rmtree(dry_folder, ignore_errors=True)
    if rank == 0 and findings:
        keep_outcome(say, "problems", 0)
    elif rank == 0:
        shutil.rmtree(say.folder)
    return 3 if findings else 0


def memory_lines() -> list[str]:
    """Describe the peak memory of each rank; every rank must call this."""
    device = engine_device()
    rank, _ = rank_and_world()
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        owner = "of the device's"
    else:
        peak, total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
        peak *= 1 if sys.platform == "darwin" else 1024
        owner = "of the process"
    return [
        f"memory of rank {number}: at most {peak_bytes / 2**30:.2f} GiB {owner}"
        + (f" {total_bytes / 2**30:.2f} GiB" if total_bytes else "")
        for number, peak_bytes, total_bytes in sorted(gather_lists([(rank, peak, total)]))
    ]


def _one_step(config: RunConfig) -> RunConfig:
    """Return the run's first step, from the base, without what others would see of it."""
    return replace(
        config,
        schedule=replace(config.schedule, steps=1),
        checkpoint=CheckpointConfig(resume="never"),
        eval=EvalConfig(),
        track=TrackConfig(),
    )


def _look_at_shards(config: RunConfig) -> list[Finding]:
    """Return what is wrong with the headers of the shards; rank 0 looks, and every rank must call this."""
    findings: list[Finding] = []
    if rank_and_world()[0] == 0:
        cache = Path(config.data.cache_dir) if config.data.cache_dir else None
        options = AuditOptions(decode=False, cache_dir=cache)
        for shards in find_sources(config.data).values():
            findings += audit_shards(shards, options)
    return gather_lists(findings)


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    if not findings:
        yield "shards: every header is sound; `moetune shards check` looks at every pixel too"
        return
    yield f"shards: {len(findings)} problems"
    yield from (f"  {finding}" for finding in findings[:SHOWN])
    if len(findings) > SHOWN:
        yield "  ..."

"""`--dry-run`: every part of a run once: checks, shards, an evaluation, one real step, a checkpoint, an adapter.

The step is a step of the real run, in a folder next to the run's that is removed. Errors of memory, disk or data that
would come later come now. The evaluations before and after the step take one row of each source.
"""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.format.printable import count_of, size_of
from data.open import find_sources
from data.prepare.audit import AuditOptions, Finding, audit_shards
from data.shards.bytes import places_of
from finetune.config import CheckpointConfig, RunConfig, TrackConfig
from finetune.ranks.collectives import barrier, gather_lists, rank_and_world
from finetune.ranks.engine import engine_device
from finetune.ranks.log import RankLog, remove_logs
from finetune.ranks.watch import Watch
from finetune.training.evaluation import held_out

SHOWN = 20


def rehearse(
    config: RunConfig, folder: Path, train: Callable[[RunConfig, Path, RankLog, Watch], int], say: RankLog, watch: Watch
) -> int:
    """Take one step of the run and leave nothing behind; every rank must call this.

    Samples with problems are listed, and then treated as in training: left out and counted.
    """
    rank, _ = rank_and_world()
    dry_folder = folder.with_name(f"{folder.name}.dry-run")
    if rank == 0:
        shutil.rmtree(dry_folder, ignore_errors=True)
        dry_folder.mkdir(parents=True)
    barrier()
    try:
        findings = _look_at_shards(config)
        say("\n".join(_finding_lines(findings)))
        train(_one_step(config), dry_folder, say, watch)
        say("\n".join(memory_lines()))
        say("dry run: passed; no files are kept")
        barrier()  # otherwise the folder would be removed while another rank still writes
    finally:
        if rank == 0:
            shutil.rmtree(dry_folder, ignore_errors=True)
    if rank == 0:
        remove_logs(say.folder)
    return 0


def memory_lines() -> list[str]:
    """Describe the peak memory of each rank; every rank must call this."""
    device = engine_device()
    rank, _ = rank_and_world()
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        owner = "of the GPU's"
    else:
        peak, total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
        peak *= 1 if sys.platform == "darwin" else 1024
        owner = "of the process"
    return [
        f"memory of rank {number}: at most {size_of(peak_bytes)} {owner}"
        + (f" {size_of(total_bytes)}" if total_bytes else "")
        for number, peak_bytes, total_bytes in sorted(gather_lists([(rank, peak, total)]))
    ]


def _one_step(config: RunConfig) -> RunConfig:
    """Return a run of the first step only, from the base, with its evaluations but without outside trackers."""
    return replace(
        config,
        schedule=replace(config.schedule, steps=1, epochs=0.0),
        checkpoint=CheckpointConfig(resume="never"),
        eval=replace(config.eval, every_steps=0, answers=min(1, config.eval.answers)),
        track=TrackConfig(),
    )


def _look_at_shards(config: RunConfig) -> list[Finding]:
    """Return the problems in the headers of the shards; rank 0 looks, and every rank must call this."""
    findings: list[Finding] = []
    if rank_and_world()[0] == 0:
        cache = Path(config.data.cache_dir) if config.data.cache_dir else None
        options = AuditOptions(decode=False, cache_dir=cache, places=places_of(config.data))
        evaluated = find_sources(held_out(config, packs_per_step=1), section="eval")
        for shards in (*find_sources(config.data).values(), *evaluated.values()):
            findings += audit_shards(shards, options)
    return gather_lists(findings)


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    errors = [finding for finding in findings if finding.level == "error"]
    if warnings := len(findings) - len(errors):
        yield f"shards: {count_of(warnings, 'warning')} on samples that training uses; see `moetune shards check`"
    if not errors:
        yield "shards: every header is valid; `moetune shards check` also decodes every image and video"
        return
    problems = count_of(len(errors), "problem")
    yield f"shards: {problems}; training continues with up to data.max_bad_samples unusable samples"
    yield from (f"  {finding}" for finding in errors[:SHOWN])
    if len(errors) > SHOWN:
        yield "  ..."

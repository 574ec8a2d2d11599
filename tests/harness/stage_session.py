"""The ranks of the stage tests: complete runs in one process, interrupted and resumed at any step."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist

from finetune.train import main

STAGES = [
    "stages.align.train=[merger]",
    "stages.align.lr=2e-3",
    "stages.all.from_step=2",
    "stages.all.data.tokens_per_pack=256",
    "stages.all.data.packs_per_step=4",
    "stages.all.warmup_steps=2",
    "stages.experts.from_step=4",
    "stages.experts.train=[experts,merger]",
    "stages.experts.data.tokens_per_pack=256",
    "stages.experts.data.packs_per_step=4",
]
WORDS = [
    "model.path=base",
    "model.dtype=float32",
    "data.sources.general.path=rows.jsonl",
    "data.workers=0",
    "adapters.attention.mode=lora",
    "adapters.attention.lr=5e-4",
    "adapters.experts.mode=lora",
    "adapters.vision_blocks.mode=frozen",
    "adapters.merger.mode=full",
    "adapters.router.mode=full",
    "moe.balance=off",
    "optim.eps=1e-6",
    "schedule.steps=6",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    *STAGES,
]


def runs(rank: int, world: int, place: Path) -> list[int]:
    """Do a complete run, then resume its checkpoints: inside a stage, at boundaries, and at another ep."""
    codes = [_run("whole")]
    for steps, more in ((2, ()), (3, ("parallel.ep=1",)), (4, ())):
        name = f"from-{steps}"
        if rank == 0:
            saved = Path(f"runs/whole/checkpoints/step-{steps:06d}")
            shutil.copytree(saved, Path(f"runs/{name}/checkpoints/{saved.name}"))
        dist.barrier()  # rank 0 has also written a report meanwhile
        codes.append(_run(name, *more, f"checkpoint.resume=runs/{name}/checkpoints/step-{steps:06d}"))
    return codes


def _run(name: str, *words: str) -> int:
    return main(["tiny-cpu", f"run.name={name}", *WORDS, *words])


def metrics(place: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]

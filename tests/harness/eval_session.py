"""The ranks of the evaluation tests: complete runs of the loop in turn, in processes that start only once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finetune.ranks.engine import start_distributed
from finetune.ranks.log import RankLog
from finetune.ranks.watch import Watch
from finetune.settings.checks import require
from finetune.settings.recipes import load_recipe
from finetune.train import train

SETTING = (
    "model.path=base",
    "model.dtype=float32",
    "data.workers=0",
    "data.sources.general.path=rows.jsonl",
    "data.tokens_per_pack=128",
    "data.packs_per_step=2",
    "optim.eps=1e-6",
    "optim.lr=1e-3",
)


def runs(rank: int, world: int, jobs: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Return by run: what this rank's log says, every evaluation's numbers, its steps' metrics, its exit code."""
    start_distributed()
    found: dict[str, dict[str, Any]] = {}
    for name, words in jobs.items():
        folder = Path("runs") / name.split("+")[0]  # relative to the current folder, as for a user
        folder.mkdir(parents=True, exist_ok=True)
        config, problems = load_recipe("tiny-cpu", [*SETTING, *words])
        require(config, problems, ranks=world)
        torch.manual_seed(rank)  # earlier runs have used the generator
        log = RankLog(folder / "logs" / name, rank)
        code = train(config, folder, log, Watch(log, data_stall=0, step_stall=0))
        dist.barrier()  # rank 0 writes the file that all ranks read
        lines = {kind: folder / f"{kind}.jsonl" for kind in ("evaluations", "metrics", "predictions")}
        found[name] = {
            kind: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for kind, path in lines.items()
        } | {"said": log.path.read_text(), "code": code}
    return found

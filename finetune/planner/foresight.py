"""Compares a run with its plan: writes both to plan.json, and warns when the measured values differ."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.stream.batch import Batch
from finetune.architecture.families import Family
from finetune.architecture.rank_shares import ResidentChoice
from finetune.config import RunConfig
from finetune.files.atomic import write_file
from finetune.planner.fit import AUTO_EP, resolve_auto
from finetune.planner.gpus import Cluster, gpu_like, this_machine
from finetune.planner.memory import memory
from finetune.planner.plan import Plan, plan, resident_choice
from finetune.planner.rank_layout import RankLayout
from finetune.planner.time import Assumed
from finetune.ranks.collectives import rank_and_world
from finetune.ranks.device import room
from finetune.settings.checks import base_family

TOLERANCE = 0.15
"""Relative difference between plan and run above which a warning is printed."""
LOOKED_AT = 2
"""The step after which the peak is read: the first creates the optimiser's state, the second runs with it."""


def resolve_auto_here(config: RunConfig, *, ranks: int) -> RunConfig:
    """Replace every `auto` that depends on the machine; on identical machines all ranks find the same values."""
    if config.parallel.ep != AUTO_EP and config.parallel.recompute != "auto":
        return config
    room_bytes, device = room()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    base = base_family(config)
    return resolve_auto(config, base, ranks=ranks, per_node=per_node, memory_bytes=room_bytes, device=device)


def resident_here(config: RunConfig, base: Family) -> ResidentChoice:
    """Decide `parallel.resident` for this machine, as its plan does; on identical machines all ranks agree."""
    return resident_choice(config, base, _cluster_here(rank_and_world()[1]), Assumed())


class Foresight:
    """The plan of one run and the values measured in it; only rank 0 writes the file."""

    def __init__(self, config: RunConfig, base: Family, folder: Path, *, say: Callable[[str], None]) -> None:
        rank, ranks = rank_and_world()
        self._path = folder / "plan.json"
        self._writes = rank == 0
        self._say = say
        self._config = config
        self._base = base
        self._plan = _plan_here(config, base, ranks)
        weights = self._plan.memory.weights
        self._foreseen = {"weights_held": (weights, weights), "peak_tensors": self._peaks(config, self._plan.layout)}
        self._measured: dict[str, Any] = {}
        self._fullest = {"tokens": 0, "supervised": 0, "patches": 0}
        self._write()

    def weights(self, kept: int) -> None:
        """Record the bytes of weights that this rank keeps."""
        self._note("weights_held", kept)

    def after(self, step: int, seconds: float, rows: Sequence[Batch], *, sp: int) -> None:
        """Record the peak memory of tensors and the time of a step, once; a CPU does not count tensors."""
        for row in rows if step <= LOOKED_AT else ():
            sizes = {
                "tokens": row.input_ids.numel(),
                "supervised": int((row.loss_weights > 0).sum()),
                "patches": len(row.image_patches) + len(row.video_patches),
            }
            self._fullest = {name: max(self._fullest[name], size) for name, size in sizes.items()}
        if step == LOOKED_AT:
            self._measured["step_seconds"] = seconds
            self._write()
            if torch.cuda.is_available():
                self.peak(torch.cuda.max_memory_allocated(), sp=sp)

    def peak(self, highest: int, *, sp: int) -> None:
        """Compare the peak memory of tensors with a plan for the rows seen so far, which are seldom the fullest."""
        tokens = self._fullest["tokens"]
        vision_tokens = self._fullest["patches"] // self._base.vision.spatial_merge_size**2
        data = replace(self._config.data, tokens_per_pack=tokens, vision_tokens_per_pack=vision_tokens)
        layout = replace(self._plan.layout, sp=sp, supervised_share=self._fullest["supervised"] / max(1, tokens))
        self._foreseen["peak_tensors_of_first_rows"] = self._peaks(replace(self._config, data=data), layout)
        self._note("peak_tensors_of_first_rows", highest)

    def _peaks(self, config: RunConfig, layout: RankLayout) -> tuple[int, int]:
        """Return the peak with an even load of the experts, and the peak of the busiest rank."""
        even = memory(config, self._base, replace(layout, skew=1.0))
        return even.peak, memory(config, self._base, layout).peak

    def _note(self, name: str, value: int) -> None:
        self._measured[name] = value
        low, high = self._foreseen[name]
        if value > high * (1 + TOLERANCE) or value < low * (1 - TOLERANCE):
            foreseen = f"{low / 1e9:.3f}" if low == high else f"{low / 1e9:.3f} to {high / 1e9:.3f}"
            self._say(
                f"warning: {name} is {value / 1e9:.3f} GB, but the plan foresaw {foreseen} GB (plan.json). Do not size "
                f"other runs by this plan, and please report the recipe"
            )
        self._write()

    def _write(self) -> None:
        if self._writes:
            content = self._plan.as_dict() | {"foreseen": self._foreseen, "measured": self._measured}
            write_file(self._path, (json.dumps(content, indent=1) + "\n").encode())


def _plan_here(config: RunConfig, base: Family, ranks: int) -> Plan:
    """Return the plan for machines like the one that this rank runs on."""
    planned = plan(config, base, _cluster_here(ranks))
    if torch.cuda.is_available():
        return planned
    layout = replace(planned.layout, device=False, segmented=True)
    return replace(planned, layout=layout, memory=memory(config, base, layout))


def _cluster_here(ranks: int) -> Cluster:
    room_bytes, device = room()
    known = gpu_like(torch.cuda.get_device_name()) if device else None
    gpu = replace(known, memory_bytes=room_bytes) if known else this_machine(room_bytes, device=device)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Cluster(gpu=gpu, gpus=ranks, per_node=min(per_node, ranks))

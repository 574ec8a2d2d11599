"""Compares the plan of 235B on 256 ranks with set-up and checkpoint planning on meta in a fake process group.

The checkpoint's own code cuts, distributes and plans for each of the 256 ranks in turn; only the data is missing.
"""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S
from starts import environment

from finetune.architecture.families import Family, family
from finetune.architecture.trained import Tensor, frozen_tensors, trained_tensors
from finetune.files.hubconfig import hub_config
from finetune.planner.gpus import cluster
from finetune.planner.plan import STATE_BYTES, Plan, plan
from finetune.planner.rank_layout import slices
from finetune.settings.checks import base_family
from finetune.settings.recipes import load_recipe

WORLD = 256
EP = 8
RECIPE = "qwen3-vl-235b-a22b-lora"

BUILD = """
import gc, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch.testing._internal.distributed.fake_pg import FakeStore
from finetune.settings.checks import require
from finetune.ranks.engine import start_distributed
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.settings.recipes import load_recipe
from finetune.training.setup import make_balance, model_options

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
start_distributed()
config, problems = load_recipe(sys.argv[4], [f"data.packs_per_step={world}"])
require(config, problems, ranks=world)
base, lines = read_family(folder), []
options = model_options(config, base, torch.device("cpu"), lines.append)
empty = build(folder, options, balance=make_balance(config, base, torch.device("cpu")))
"""
RANK = """
replicas = dist.get_world_size(groups._get_expert_data_parallel_group(f"ep_size_{config.parallel.ep}"))
counted = {"slices": {"trained": 0, "frozen": 0}, "on_meta": True, "replicas": replicas}
for name, tensor in empty.module.named_parameters():
    expert = getattr(tensor, "ds_zero_placement_family", "") == "autoep_expert"
    piece = -(-tensor.numel() // (replicas if expert else world))
    counted["slices"]["trained" if tensor.requires_grad else "frozen"] += piece
    counted["on_meta"] &= tensor.is_meta
counted["experts"] = sorted({len(m.local_experts) for m in empty.module.modules() if hasattr(m, "local_experts")})
print(json.dumps(counted))
"""
PLANS = """
from finetune.checkpoint.pieces import Meshes, flat_tensors, planned
from finetune.checkpoint.slices import KINDS, Slice, cuts
from torch.distributed.checkpoint import DefaultSavePlanner

def of(rank):
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    held = [
        Slice(canonical=c.canonical, shape=c.shape, ep=c.ep, steps=torch.empty((), device="meta"),
              views={kind: torch.empty(c.filled, dtype=torch.float32, device="meta") for kind in KINDS})
        for c in cuts(empty, rank, world)
    ]
    return planned(flat_tensors(held, Meshes()))[1]

gc.freeze()
plans, rows = [], {}
for rank in range(world):
    plan = of(rank)
    plans += [plan] if sys.argv[5:] else []
    for item in plan.items:
        tensor = item.tensor_data
        assert tensor.properties.dtype == torch.float32
        size, pieces = rows.setdefault(item.index.fqn, (tensor.size[0], []))
        pieces.append((rank, tensor.chunk.offsets[0], tensor.chunk.sizes[0]))
for kept, plan in zip(DefaultSavePlanner().create_global_plan(plans)[0] if plans else [], plans):
    assert [item.index.fqn for item in kept.items] == [item.index.fqn for item in plan.items]
print(json.dumps(rows))
"""


def _run(folder: Path, base: Family, code: str, rank: int, *words: str) -> Any:
    (folder / "config.json").write_text(json.dumps(hub_config(base)))
    command = [sys.executable, "-W", "ignore", "-c", BUILD + code, str(rank), str(WORLD), str(folder), RECIPE, *words]
    environ = environment() | {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0"}
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=4 * LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _planned(base: Family) -> tuple[Plan, tuple[Tensor, ...], tuple[Tensor, ...], int]:
    """Return the plan of the recipe, its trained and frozen tensors, and the number of checkpoints to keep."""
    config, problems = load_recipe(RECIPE, [f"data.packs_per_step={WORLD}"])
    assert not problems
    planned = plan(config, base, cluster("h100-80gb", gpus=WORLD, per_node=None, price=None))
    trained, frozen = (make(base, config.adapters, ep=EP) for make in (trained_tensors, frozen_tensors))
    assert base.name == base_family(config).name
    return planned, trained, frozen, config.checkpoint.keep


@pytest.mark.parametrize("rank", [WORLD - 1, pytest.param(0, marks=pytest.mark.slow)])  # rank 0 repeats the same checks
def test_a_rank_of_256_holds_the_planned_bytes(tmp_path: Path, rank: int) -> None:
    base = family("qwen3-vl-235b-a22b")
    planned, trained, frozen, _ = _planned(base)
    counted = _run(tmp_path, base, RANK, rank)
    assert counted["on_meta"]
    assert counted["replicas"] == WORLD // EP
    assert counted["experts"] == [16]
    assert counted["slices"]["trained"] == slices(trained, planned.layout)
    assert counted["slices"]["frozen"] == slices(frozen, planned.layout)
    assert planned.memory.weights == 2 * sum(counted["slices"].values())
    assert planned.memory.always["masters"] == 4 * counted["slices"]["trained"]
    assert planned.fits


# all 94 layers are 866,000 pieces, which take minutes
@pytest.mark.parametrize("layers", [3, pytest.param(94, marks=pytest.mark.slow)])
def test_256_ranks_plan_a_checkpoint_without_gaps_and_of_the_planned_size(tmp_path: Path, layers: int) -> None:
    whole = family("qwen3-vl-235b-a22b")
    assert whole.text.num_hidden_layers == 94
    base = replace(whole, text=replace(whole.text, num_hidden_layers=layers))
    planned, trained, _, keep = _planned(base)
    rows = _run(tmp_path, base, PLANS, 0, *(["with torch's own global plan"] if layers == 3 else []))
    bytes_of = [0] * WORLD
    for size, pieces in rows.values():
        assert len({rank for rank, _, _ in pieces}) == len(pieces) == WORLD
        spans = sorted((begin, begin + length) for _, begin, length in pieces if length)
        assert spans[0][0] == 0
        assert spans[-1][1] == size
        assert all(one[1] == other[0] for one, other in pairwise(spans)), "a gap or a slice that is written twice"
        for rank, _, length in pieces:
            bytes_of[rank] += 4 * length
    assert {kind for kind in (name.partition("/")[0] for name in rows)} == {"master", "exp_avg", "exp_avg_sq"}
    assert len(rows) == 3 * len(trained)
    assert bytes_of == [STATE_BYTES * sum(_held(tensor, rank) for tensor in trained) for rank in range(WORLD)]
    assert sum(bytes_of) == STATE_BYTES * planned.trained
    assert sum(bytes_of) * (keep + 1) == planned.host.disk["checkpoints"]


def _held(tensor: Tensor, rank: int) -> int:
    """Return the elements that one rank keeps, by the engine's rule: equal slices in order, the last ones shorter."""
    pieces, place = (WORLD // EP, rank // EP) if tensor.expert else (WORLD, rank)
    piece = -(-tensor.elements // pieces)
    return min(piece, max(0, tensor.elements - place * piece))

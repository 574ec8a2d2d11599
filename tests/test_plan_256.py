"""235B under 256 ranks on one machine: set-up on meta in a pretended process group, and the planner says the same."""

import json
import subprocess
import sys

import pytest
from starts import environment

from finetune.checks import base_family
from finetune.families import family
from finetune.gpus import cluster
from finetune.hubconfig import hub_config
from finetune.plan import STATE_BYTES, plan
from finetune.plan_memory import slices
from finetune.recipes import load
from finetune.trained import frozen_tensors, trained_tensors

WORLD, RECIPE = 256, "qwen3-vl-235b-a22b-lora"

RANK = """
import json, sys
from pathlib import Path
import torch, deepspeed
import torch.distributed as dist
from deepspeed.utils import groups
from torch.testing._internal.distributed.fake_pg import FakeStore
from finetune.checks import require
from finetune.hubconfig import read_family
from finetune.model import build
from finetune.recipes import load
from finetune.setup import make_balance, model_options

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
deepspeed.init_distributed()
config, problems = load(sys.argv[4], [f"data.packs_per_step={world}"])
require(config, problems, ranks=world)
base, said = read_family(folder), []
options = model_options(config, base, torch.device("cpu"), said.append)
empty = build(folder, options, balance=make_balance(config, base, torch.device("cpu")))
replicas = dist.get_world_size(groups._get_expert_data_parallel_group(f"ep_size_{config.parallel.ep}"))
found = {"slices": {"trained": 0, "frozen": 0}, "on_meta": True, "replicas": replicas, "largest": 0, "saved": 0}
for name, tensor in empty.module.named_parameters():
    expert = getattr(tensor, "ds_zero_placement_family", "") == "autoep_expert"
    piece = -(-tensor.numel() // (replicas if expert else world))
    found["slices"]["trained" if tensor.requires_grad else "frozen"] += piece
    found["on_meta"] &= tensor.is_meta
    if name in empty.trained:
        place = (rank // config.parallel.ep) if expert else rank
        found["saved"] += 12 * min(piece, max(0, tensor.numel() - place * piece))
found["experts"] = sorted({len(m.local_experts) for m in empty.module.modules() if hasattr(m, "local_experts")})
found["buffers"] = sum(b.numel() * b.element_size() for b in empty.module.buffers() if b.is_meta)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("huge")
    (folder / "config.json").write_text(json.dumps(hub_config(family("qwen3-vl-235b-a22b"))))
    found = {}
    for rank in (0, WORLD - 1):
        words = [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(WORLD), str(folder), RECIPE]
        environ = environment() | {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0"}
        done = subprocess.run(words, env=environ, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        found[rank] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_rank_of_256_holds_and_saves_what_the_planner_says(ranks: dict[int, dict]) -> None:
    config, problems = load(RECIPE, [f"data.packs_per_step={WORLD}"])
    assert not problems
    base = base_family(config)
    planned = plan(config, base, cluster("h100-80gb", gpus=WORLD, per_node=None, price=None))
    trained, frozen = (make(base, config.adapters, ep=8) for make in (trained_tensors, frozen_tensors))
    for found in ranks.values():
        assert found["on_meta"]
        assert found["replicas"] == WORLD // 8
        assert found["experts"] == [16]
        assert found["slices"]["trained"] == slices(trained, planned.layout)
        assert found["slices"]["frozen"] == slices(frozen, planned.layout)
        assert planned.memory.weights == 2 * sum(found["slices"].values())
    assert planned.memory.always["masters"] == 4 * ranks[0]["slices"]["trained"]
    whole = ranks[0]["saved"] * WORLD
    per_save = planned.host.disk["checkpoints"] / (config.checkpoint.keep + 1)
    assert per_save == STATE_BYTES * planned.trained
    assert whole == pytest.approx(per_save, rel=0.02)
    assert planned.fits

"""The base and the adapter for measuring merge and export: experts of the 30B model, as many as fit the size."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune.files.basefiles import open_base
from finetune.files.tiny import TinyModel, write_tiny
from moe.packing import pack_lora

GB = float(os.environ.get("MOETUNE_BENCH_GB", "4"))
"""Size of the base in gigabytes; the targets apply to 4 and above."""
LAYERS = 4
HIDDEN = 2048
INNER = 768


def write_base(folder: Path) -> int:
    """Write a base of about GB gigabytes in bfloat16 and return its bytes of weights."""
    experts = math.ceil(GB * 1e9 / (2 * 3 * HIDDEN * INNER * LAYERS))
    model = TinyModel(
        hidden=HIDDEN,
        experts=max(experts, 4),
        expert_hidden=INNER,
        layers=LAYERS,
        heads=16,
        kv_heads=4,
        head_dim=128,
        dtype="bfloat16",
        shard_bytes=500_000_000,
    )
    return write_tiny(folder, model).weight_bytes


def write_adapter(base: Path, folder: Path, *, r: int = 8) -> int:
    """Write an adapter of all experts and attention in PEFT's form and return its bytes."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    for name, shape in open_base(base).shapes.items():
        experts = shape[0] if len(shape) == 3 else 1
        if not name.endswith(("q_proj.weight", "o_proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            continue
        a, b = torch.randn(experts, r, shape[-1]), 0.02 * torch.randn(experts, shape[-2], r)
        module = name.removesuffix(".weight").replace(".gate_up_proj", ".base_layer").removesuffix(".down_proj")
        pair = pack_lora(a, b)
        for kind, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{kind}.weight"] = tensor.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_parameters": stacks, "peft_version": "0.21.2"}
    names = json.dumps(config | {"target_modules": ["q_proj", "o_proj"]})
    (folder / "adapter_config.json").write_text(names)
    return (folder / "adapter_model.safetensors").stat().st_size


def measured(side: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Run one side in a fresh process."""
    with tempfile.NamedTemporaryFile() as result:
        paths = [str(base), str(adapter), str(out), result.name]
        words = [sys.executable, "-m", "benchmarks.weights.merge_sides", side, *paths]
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}  # each side may use all cores
        done = subprocess.run(
            words, env=os.environ | {"DS_ACCELERATOR": "cpu"} | threads, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
        took: dict[str, Any] = json.loads(Path(result.name).read_text())
    return took

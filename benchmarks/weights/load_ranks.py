"""One rank of the load benchmarks: load a base with ours or transformers, and record its cost and its logits."""

import argparse
import json
import time
from math import prod
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe  # noqa: F401  # importing it is not timed

from benchmarks.harness.memory import AnonymousPeak
from finetune.architecture.shapes import is_expert_stack
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import ModelOptions, bits_of
from finetune.model.weights import load_weights
from finetune.ranks.engine import EngineOptions, engine_config, start_distributed
from moe.parallel import LayerOptions

BATCH = 32


def main() -> None:
    """Load, then run a few tokens through the engine; rank R writes OUT.R."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "transformers", "raw"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--bits", choices=("none", "int8", "nf4"), help="load in bfloat16, with experts in this form")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed()
    dist.barrier()
    config = engine_config(EngineOptions(dtype="float32"))
    results: dict[str, Any] = {}
    with AnonymousPeak() as memory:
        start = time.perf_counter()
        module = _load(args, config, results)
        dist.barrier()
        results["seconds"] = time.perf_counter() - start
    results |= {"peak": memory.peak_bytes, "kept": memory.end_bytes - memory.start_bytes}
    if module is not None:
        engine = module
        if any(True for _ in module.parameters()):  # else all weights are resident buffers, and no engine is needed
            engine, *_ = deepspeed.initialize(model=module, config=config)
        ids = torch.arange(BATCH)[None] + 7 * dist.get_rank()
        with torch.no_grad():
            results["logits"] = engine(input_ids=ids, use_cache=False).logits[0, -1, :16].float().tolist()
    args.out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(results))


def _load(args: argparse.Namespace, config: dict[str, Any], results: dict[str, Any]) -> torch.nn.Module | None:
    if args.side == "raw":
        _read_my_half(args.folder)
        return None
    if args.side == "transformers":
        keep = HfDeepSpeedConfig(config)  # transformers partitions while loading as long as this object lives
        model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(args.folder, dtype=torch.float32)
        del keep
        return model
    layer = LayerOptions(resident=args.resident, bits=bits_of(args.bits or "none"))
    dtype = torch.bfloat16 if args.bits else torch.float32
    empty = build(args.folder, ModelOptions(ep_size=args.ep, layer=layer, resident=args.resident, dtype=dtype))
    report = load_weights(empty, open_base(args.folder, empty.expected), engine_config=config)
    largest = max(prod(shape) // (args.ep if is_expert_stack(name) else 1) for name, shape in empty.expected.items())
    results |= {"read": report.bytes_read, "held": report.bytes_held, "largest": dtype.itemsize * largest}
    return empty.module


def _read_my_half(folder: Path) -> None:
    """Read this rank's share of the weight files and discard it: the cost of the disk and the kernel alone."""
    block = memoryview(bytearray(64 * 2**20))
    for path in sorted(folder.glob("*.safetensors"))[dist.get_rank() :: dist.get_world_size()]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


if __name__ == "__main__":
    main()

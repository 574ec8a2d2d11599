"""One rank of `train-step` and `host-overhead`: train the same adapter on the same tokens, with ours or stock parts."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.harness.rows import step_of, text_row
from benchmarks.steps.start_adapter import ADAPTERS, start_adapter
from data.render.vision import read_spec
from finetune.adapters.file import open_adapter
from finetune.config import LossConfig, ModelConfig, ParallelConfig, RunConfig
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.model.forward import PackedModel
from finetune.model.lora import with_adapters
from finetune.model.recompute import set_recompute
from finetune.model.weights import load_weights
from finetune.ranks.engine import EngineOptions, engine_config, engine_device, initialize, start_distributed
from finetune.training.setup import make_balance, model_options
from finetune.training.update import take_step

LR, CLIP = 1e-4, 1.0


def main() -> None:
    """Take the steps of every case and write their seconds and losses; rank R writes OUT.R."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "peer", "adapter"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=json.loads, default=[])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--recompute", default="layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed()
    cases: list[dict[str, Any]] = []
    if args.side == "adapter":
        start_adapter(args.folder)
    else:
        step = (ours if args.side == "ours" else peer)(args.folder, args.recompute)
        cases = [_timed(step, tokens, micro_batches, args.steps) for tokens, micro_batches in args.cases]
    args.out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(cases))


def _timed(step: Callable[[list[Tensor]], float], tokens: int, micro_batches: int, steps: int) -> dict[str, Any]:
    seconds, losses = [], []
    for number in range(steps):
        rows = [_tokens(number, micro, tokens) for micro in range(micro_batches)]
        dist.barrier()
        start = time.perf_counter()
        losses.append(step(rows))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "losses": losses}


def _tokens(*place: int) -> Tensor:
    """Return this rank's row of one micro-batch."""
    generator = torch.Generator().manual_seed(hash((dist.get_rank(), *place)) % 2**31)
    return torch.randint(10, 200, (place[-1],), generator=generator).to(engine_device())


def ours(base: Path, recompute: Any) -> Callable[[list[Tensor]], float]:
    """Build our side from the parts of the training loop, and return its step."""
    parallel = ParallelConfig(ep=dist.get_world_size(), resident="frozen")
    config = RunConfig(model=ModelConfig(path=str(base), dtype="float32"), parallel=parallel, loss=LossConfig())
    device = engine_device()
    balance = make_balance(config, read_family(base), device)
    options = model_options(config, read_family(base), device, lambda _: None)
    empty = build(base, with_adapters(ADAPTERS, options), balance=balance)
    engine_options = EngineOptions(dtype="float32", lr=LR, clip_norm=CLIP)
    files = open_base(base, empty.expected)
    load_weights(empty, files, engine_config=engine_config(engine_options), start=open_adapter(base.parent / "start"))
    set_recompute(empty.module, recompute)
    engine = initialize(PackedModel(empty.module, spec=read_spec(base)), engine_options)
    engine.train()
    done = 0

    def step(rows: list[Tensor]) -> float:
        nonlocal done
        batches = [text_row([row], [torch.ones(len(row))]) for row in rows]
        figures, *_ = take_step(engine, step_of(batches, done), config, balance, done, device, lambda *_: None)
        done += 1
        return figures["loss"]

    return step


def peer(base: Path, recompute: str) -> Callable[[list[Tensor]], float]:
    """Build what a user would write: transformers' model, PEFT's adapter from the same file, and DeepSpeed ZeRO-3."""
    model: Any = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model = PeftModel.from_pretrained(model, base.parent / "start", is_trainable=True)
    if recompute != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 31,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()

    def step(rows: list[Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=engine_device())
        for number, row in enumerate(rows):
            engine.set_gradient_accumulation_boundary(number == len(rows) - 1)
            loss = engine(input_ids=row[None], labels=row[None], use_cache=False).loss / len(rows)
            engine.backward(loss)
            total += loss.detach().double()
        engine.step()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    return step


if __name__ == "__main__":
    main()

"""The two sides of `gpu-step` on one drawn base: our training step, and what a user would run on one card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.gpu.drawn import drawn_base
from benchmarks.harness.rows import step_of
from data.render.vision import normalise, read_spec
from data.stream.batch import Batch
from finetune.adapters.file import open_adapter
from finetune.adapters.write_trained import write_adapter
from finetune.config import RunConfig
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.model.empty import EmptyModel
from finetune.model.forward import PackedModel
from finetune.model.weights import load_weights, rebuild_tables
from finetune.ranks.engine import engine_config, engine_device, initialize
from finetune.training.setup import engine_options, make_balance, model_options, save_memory
from finetune.training.update import take_step

TakeStep = Callable[[Sequence[Batch]], dict[str, float]]
"""One step on some rows: loss and gradient norm before the update."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A side that is ready to step; `write` saves its adapter in PEFT's format."""

    name: str
    step: TakeStep
    write: Callable[[Path], object]


def ours(base: Path, config: RunConfig, *, start: Path | None = None) -> Trainer:
    """Build our side from the parts of the training loop; every rank must call this."""
    device, family = engine_device(), read_family(base)
    balance = make_balance(config, family, device)
    empty: EmptyModel = build(base, model_options(config, family, device, print), balance=balance)
    options = engine_options(config)
    files = drawn_base(base, empty.expected, device)
    load_weights(empty, files, engine_config=engine_config(options), start=open_adapter(start) if start else None)
    files.last.clear()
    packed = PackedModel(empty.module, spec=read_spec(base), normalise=config.loss.normalise)
    print(save_memory(packed, config))
    engine = initialize(packed, options)
    engine.train()
    done = 0

    def step(rows: Sequence[Batch]) -> dict[str, float]:
        nonlocal done
        figures, *_ = take_step(engine, step_of(rows, done), config, balance, done, device, lambda *_: None)
        done += 1
        return {name: figures[name] for name in ("loss", "grad_norm")}

    return Trainer(name="moetune", step=step, write=lambda folder: write_adapter(empty, folder, base=str(base)))


def peer(base: Path, adapter: Path, config: RunConfig, *, zero3: bool = False, liger: bool = False) -> Trainer:
    """Build the peer: transformers' model with grouped_mm, PEFT's adapter with the same values, AdamW or ZeRO-3.

    It gets the same packed rows: transformers finds the samples by their positions, and masks them from each other.
    """
    device, spec = engine_device(), read_spec(base)
    model = _plain_model(base, device, getattr(torch, config.model.dtype))
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_vl_moe

        apply_liger_kernel_to_qwen3_vl_moe(model=model)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = config.optim
    adamw = torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    model.train()
    engine = _zero3(model, adamw, config) if zero3 else None

    def step(rows: Sequence[Batch]) -> dict[str, float]:
        total = sum(float((row.loss_weights > 0).sum()) for row in rows)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for number, row in enumerate(rows):
            share = float((row.loss_weights > 0).sum()) / total
            run = engine if engine is not None else model
            loss = run(**_inputs(row, spec, device, model.dtype)).loss * share
            loss_sum += loss.detach().double()
            if engine is None:
                loss.backward()
            else:
                engine.set_gradient_accumulation_boundary(number == len(rows) - 1)
                engine.backward(loss, scale_wrt_gas=False)
        if engine is not None:
            engine.step()
            return {"loss": float(loss_sum), "grad_norm": float(engine.get_global_grad_norm())}
        norm = nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        adamw.step()
        adamw.zero_grad()
        return {"loss": float(loss_sum), "grad_norm": float(norm)}

    name = f"transformers grouped_mm + PEFT{' + Liger' if liger else ''}{' + DeepSpeed ZeRO-3' if zero3 else ''}"
    return Trainer(name=name, step=step, write=model.save_pretrained)


@torch.no_grad()
def _plain_model(base: Path, device: torch.device, dtype: torch.dtype) -> Any:
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    files = drawn_base(base, {name: tuple(p.shape) for name, p in model.named_parameters()}, device)
    for name in files.shapes:
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, nn.Parameter(files.read(name), requires_grad=False))
    files.last.clear()
    rebuild_tables(model, device)
    return model


def _zero3(model: Any, adamw: torch.optim.Optimizer, config: RunConfig) -> Any:
    options = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 31,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=options)
    return engine


def _inputs(row: Batch, spec: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | bool]:
    ids = row.input_ids.to(device)
    given: dict[str, Tensor | bool] = {
        "input_ids": ids,
        "position_ids": row.positions.to(device),
        "use_cache": False,
        "labels": torch.where(row.loss_weights.to(device) > 0, ids, -100),
    }
    for patches, grids, (pixels, grid) in (
        (row.image_patches, row.image_grids, ("pixel_values", "image_grid_thw")),
        (row.video_patches, row.video_grids, ("pixel_values_videos", "video_grid_thw")),
    ):
        if len(patches):
            given |= {pixels: normalise(patches.to(device), spec=spec, dtype=dtype), grid: grids.to(device)}
    return given

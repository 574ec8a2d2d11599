"""The process of `waits`: run a row through our model and through stock parts, both on the second device."""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.device.second_device import DEVICE, SecondDevice, move_module
from benchmarks.planner.plan_case import Case, packed_row
from benchmarks.steps.start_adapter import ADAPTERS, start_adapter
from data.render.vision import VisionSpec, normalise, read_spec
from data.stream.batch import Batch
from finetune.adapters.file import open_adapter
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.files.tiny import TinyModel, write_tiny
from finetune.model.build import build
from finetune.model.empty import ModelOptions
from finetune.model.forward import PackedModel
from finetune.model.lora import with_adapters
from finetune.model.recompute import set_recompute
from finetune.model.varlen import register
from finetune.model.weights import load_weights
from finetune.ranks.engine import start_distributed

CASES = {
    "text": Case(words=(), samples=(64,)),
    "media": Case(words=(), samples=(96,), images=((1, 4, 8), (1, 8, 8)), videos=((2, 4, 4),)),
}


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Results of one row for both sides: its loss, and its waits by place."""

    ours: Mapping[str, int]
    peer: Mapping[str, int]
    ours_loss: Tensor
    peer_loss: Tensor


def count(layers: int, tower_blocks: int, rows: Sequence[str]) -> dict[str, Waits]:
    """Return the waits of both sides for each kind of row, in forward and backward with recompute by layer."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    start_distributed()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_tiny(base, TinyModel(layers=layers, vision_depth=tower_blocks))
        start_adapter(base)
        batches = {kind: packed_row(CASES[kind], read_family(base), read_spec(base)) for kind in rows}
        ours, peer = _ours(base), _peer(base, read_spec(base))
        counted = {}
        for kind, batch in batches.items():
            (our_waits, our_loss), (peer_waits, peer_loss) = (_counted(side, batch) for side in (ours, peer))
            counted[kind] = Waits(ours=our_waits, peer=peer_waits, ours_loss=our_loss, peer_loss=peer_loss)
        return counted


Step = Callable[[Batch], Callable[[], Tensor]]
"""Prepares the inputs of a row, and returns a function that runs forward and backward and returns the loss."""


def _counted(step: Step, batch: Batch) -> tuple[dict[str, int], Tensor]:
    with SecondDevice() as device:
        run = step(batch)
        device.waits.clear()
        loss = run()
        return dict(device.waits.most_common()), loss.cpu()


def _ours(base: Path) -> Step:
    register()
    empty = build(base, with_adapters(ADAPTERS, ModelOptions(dtype=torch.float32, attention="varlen")))
    load_weights(empty, open_base(base, empty.expected), start=open_adapter(base.parent / "start"))
    set_recompute(empty.module, "layer")
    packed = PackedModel(empty.module, spec=read_spec(base)).train()
    with SecondDevice():
        move_module(packed)

    def step(batch: Batch) -> Callable[[], Tensor]:
        def run() -> Tensor:
            objective: Tensor = packed(batch=packed.send(batch, DEVICE).arrived()).objective
            objective.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return objective.detach() / float(batch.loss_weights.sum())

        return run

    return step


def _peer(base: Path, spec: VisionSpec) -> Step:
    model: Any = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model = PeftModel.from_pretrained(model, base.parent / "start", is_trainable=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with SecondDevice():
        move_module(model)
    ids = read_family(base)

    def step(batch: Batch) -> Callable[[], Tensor]:
        kinds = (batch.input_ids == ids.image_token_id).int() + 2 * (batch.input_ids == ids.video_token_id).int()
        inputs = {"input_ids": batch.input_ids, "labels": batch.input_ids, "mm_token_type_ids": kinds}
        inputs["position_ids"] = batch.positions[1:]  # else built from lists, with one wait per image
        for patches, grids, names in (
            (batch.image_patches, batch.image_grids, ("pixel_values", "image_grid_thw")),
            (batch.video_patches, batch.video_grids, ("pixel_values_videos", "video_grid_thw")),
        ):
            if len(patches):
                inputs |= {names[0]: normalise(patches, spec=spec), names[1]: grids}
        inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}

        def run() -> Tensor:
            loss: Tensor = model(**inputs, use_cache=False).loss
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return loss.detach()

        return run

    return step

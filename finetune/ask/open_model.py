"""Opening a model to be asked: base, base with adapter, or merged, by our loader.

An adapter of ours stays beside its weights: the model computes as it did in training. One of another tool is added to
them in memory, in float32 with one rounding.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from data.render.sample import Renderer
from data.render.vision import read_spec
from finetune.adapters.file import AdapterFile, is_ours, open_adapter
from finetune.adapters.provenance import require_same_base
from finetune.adapters.source import AdapterSource, open_source, require_finite
from finetune.architecture.yarn import extension
from finetune.ask.speaker import Speaker
from finetune.config import RunConfig
from finetune.files.basefiles import open_base
from finetune.files.hub import model_folder
from finetune.files.hubconfig import read_family
from finetune.files.hubfiles import stop_tokens
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.model.weights import base_slots, load
from finetune.ranks.device import open_device
from moe.experts import ExpertLora as Lora
from moe.parallel import LayerOptions
from moe.router import RouterOptions

Dtype = Literal["auto", "float32", "bfloat16"]


def open_speaker(
    model: str,
    *,
    adapter: Path | None = None,
    config: RunConfig | None = None,
    device: str = "cpu",
    dtype: Dtype = "auto",
    layout: str = "auto",
    other_base: bool = False,
) -> Speaker:
    """Load a base or merged model, with an adapter on it or without; one process holds it whole.

    Of the configuration count data.image, data.video, data.chat, context and moe.router_float32.
    """
    place = open_device(device)
    folder, config = model_folder(model), config or RunConfig()
    ours = open_adapter(adapter) if adapter is not None and is_ours(adapter) else None
    held = torch.float32 if dtype == "float32" or (dtype == "auto" and place.type == "cpu") else torch.bfloat16
    empty = build(folder, _options(ours, config, folder, held))
    files = open_base(folder, empty.expected, layout=layout)
    other = open_source(adapter, files.shapes) if adapter is not None and ours is None else None
    found = ours or other
    if found is not None:
        require_finite(found.folder)
    if found is not None and not other_base:
        require_same_base(found.folder, found.metadata, files)
    if other is not None:
        other.check_copies(files)
    load(empty, files, start=ours)
    if other is not None:
        _add(empty, other)
    has_tower = getattr(empty.module.model, "visual", None) is not None
    data = config.data
    return Speaker(
        empty.module,
        renderer=Renderer(folder, image=data.image, video=data.video, chat=data.chat),
        spec=read_spec(folder) if has_tower else None,
        stops=stop_tokens(folder),
        device=next(t for t in (*empty.module.parameters(), *empty.module.buffers())).device,
        switches=ours is not None and all(ours.families.values()),
    )


def _options(adapter: AdapterFile | None, config: RunConfig, folder: Path, dtype: torch.dtype) -> ModelOptions:
    """The layout that holds what the adapter changes; without one, everything is frozen."""
    families = dict(adapter.families) if adapter is not None else {}
    modes: dict[str, Any] = {part: "lora" if lora else "full" for part, lora in families.items()}
    router: Lora | None = families.get("router")
    own = RouterOptions(mode=modes.get("router", "frozen"), float32=config.moe.router_float32)
    layer = LayerOptions(
        experts=modes.get("experts", "frozen"),
        lora=families.get("experts"),
        router=replace(own, r=router.r, alpha=router.alpha) if router else own,
    )
    dense = {part: lora for part, lora in families.items() if part not in ("experts", "router")}
    return ModelOptions(
        layer=layer,
        lora={part: lora for part, lora in dense.items() if lora},
        train=tuple(part for part, lora in dense.items() if not lora),
        dtype=dtype,
        attention="sdpa",
        context=extension(config.context, read_family(folder)),
    )


@torch.no_grad()
def _add(empty: EmptyModel, adapter: AdapterSource) -> None:
    """Add another tool's adapter to the weights, one expert's matrix at a time."""
    for slot in base_slots(empty):
        if slot.canonical in adapter.full:
            slot.tensor.copy_(adapter.read_full(slot.canonical))
        elif slot.canonical in adapter.changes:
            change = adapter.changes[slot.canonical]
            matrices = slot.tensor if slot.tensor.ndim == 3 else slot.tensor[None]
            for matrix, a, b in zip(matrices, *change.read(), strict=True):
                delta = change.scale * (b.to(matrix.device).float() @ a.to(matrix.device).float())
                matrix.copy_(matrix.float() + delta)

"""Opens a model for questions, with our loader: a base, a base with an adapter, or a merged model.

Our own adapter is kept apart from the weights, so the model computes as in training. Another tool's adapter is added
to the weights in memory, in float32 with one rounding.
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
from finetune.model.empty import EmptyModel, ModelOptions, bits_of
from finetune.model.weights import base_slots, load_weights
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
    """Load a base or merged model, with or without an adapter, into one process.

    Of the configuration, only data.image, data.video, data.chat, context, moe.router_float32 and model.quantise have an
    effect.
    """
    opened_device = open_device(device)
    folder, config = model_folder(model), config or RunConfig()
    ours = open_adapter(adapter) if adapter is not None and is_ours(adapter) else None
    is_float32 = dtype == "float32" or (dtype == "auto" and opened_device.type == "cpu")
    options = _options(ours, config, folder, torch.float32 if is_float32 else torch.bfloat16)
    if adapter is not None and ours is None and (options.layer.bits or options.dense_bits):
        raise ValueError(
            f"{adapter} is another tool's adapter, which is added to the weights, and model.quantise holds these in "
            f"fewer bits. Set model.quantise.experts=none and model.quantise.dense=none"
        )
    empty = build(folder, options)
    files = open_base(folder, empty.expected, layout=layout)
    foreign = open_source(adapter, files.shapes) if adapter is not None and ours is None else None
    source = ours or foreign
    if source is not None:
        require_finite(source.folder)
    if source is not None and not other_base:
        require_same_base(source.folder, source.metadata, files)
    if foreign is not None:
        foreign.check_copies(files)
    load_weights(empty, files, start=ours)
    if foreign is not None:
        _add(empty, foreign)
    has_tower = getattr(empty.module.model, "visual", None) is not None
    data = config.data
    return Speaker(
        empty.module,
        renderer=Renderer(folder, image=data.image, video=data.video, chat=data.chat),
        spec=read_spec(folder) if has_tower else None,
        stops=stop_tokens(folder),
        device=next(t for t in (*empty.module.parameters(), *empty.module.buffers())).device,
        switches=ours is not None and all(ours.families.values()),
        adapted=[part for part, lora in ours.families.items() if lora] if ours is not None else (),
    )


def _options(adapter: AdapterFile | None, config: RunConfig, folder: Path, dtype: torch.dtype) -> ModelOptions:
    """Return the options of a model with the adapter's parts; without an adapter, everything is frozen."""
    families = dict(adapter.families) if adapter is not None else {}
    modes: dict[str, Any] = {part: "lora" if lora else "full" for part, lora in families.items()}
    router: Lora | None = families.get("router")
    router_options = RouterOptions(mode=modes.get("router", "frozen"), float32=config.moe.router_float32)
    if router:
        router_options = replace(router_options, r=router.r, alpha=router.alpha)
    layer = LayerOptions(
        experts=modes.get("experts", "frozen"),
        lora=families.get("experts"),
        router=router_options,
        bits=bits_of(config.model.quantise.experts),
    )
    dense = {part: lora for part, lora in families.items() if part not in ("experts", "router")}
    return ModelOptions(
        layer=layer,
        lora={part: lora for part, lora in dense.items() if lora},
        train=tuple(part for part, lora in dense.items() if not lora),
        dtype=dtype,
        dense_bits=bits_of(config.model.quantise.dense),
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

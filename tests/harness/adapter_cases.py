"""Configurations for the tests of adapter files, and functions to build models and compare adapters."""

from pathlib import Path

import torch
from bases import base
from safetensors.torch import load_file
from torch import Tensor

from finetune.adapters.provenance import Provenance
from finetune.adapters.write_trained import write_adapter
from finetune.config import AdaptersConfig, DensePartConfig, ExpertPartConfig, PartConfig, RouterPartConfig
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.model.lora import with_adapters
from finetune.model.weights import load_weights
from moe.parallel import LayerOptions

WIDE = AdaptersConfig(
    attention=DensePartConfig(mode="lora", r=5, alpha=12.0),
    experts=ExpertPartConfig(mode="lora", r=4, alpha=6.0, rslora=True),
    vision_blocks=DensePartConfig(mode="lora", r=3, alpha=7.0),
    router=RouterPartConfig(mode="full"),
)
FULL = AdaptersConfig(  # every part that can be trained in full, and LoRA on the router
    attention=DensePartConfig(mode="full"),
    experts=ExpertPartConfig(mode="full"),
    router=RouterPartConfig(mode="lora", r=7, alpha=9.0),
    merger=DensePartConfig(mode="lora", r=6, alpha=9.0),
    deepstack_mergers=DensePartConfig(mode="full"),
    **{family: PartConfig(mode="full") for family in ("patch_embed", "pos_embed", "norms", "embeddings", "head")},
)
DENSE = AdaptersConfig(
    attention=DensePartConfig(mode="lora", r=5, alpha=12.0),
    mlp=DensePartConfig(mode="lora", r=4, alpha=4.0, rslora=True),
    merger=DensePartConfig(mode="full"),
)
FULL_ONLY = AdaptersConfig(merger=DensePartConfig(mode="full"), norms=PartConfig(mode="full"))


def made(folder: Path, config: AdaptersConfig, *, ep: int = 1, resident: bool = True) -> EmptyModel:
    options = ModelOptions(
        ep_size=ep, layer=LayerOptions(resident=resident, seed=3), resident=resident, dtype=torch.float32
    )
    return build(folder, with_adapters(config, options))


def drawn_adapter(folder: Path, adapters: AdaptersConfig, config: dict | None = None) -> Path:
    """An adapter as training would write it, its values drawn."""
    empty, files = made(base(), adapters), open_base(base())
    load_weights(empty, open_base(base(), empty.expected, layout="auto"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in empty.module.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    origin = Provenance(base=files, base_name=str(base()), config=config or {})
    write_adapter(empty, folder, base=str(base()), provenance=origin)
    return folder


def tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    return bool((first - second).abs().max() <= tolerance * second.abs().max())

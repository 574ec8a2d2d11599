"""What the tests of adapter files adapt, and how they build and compare it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.config import AdaptersConfig, DenseFamilyConfig, ExpertFamilyConfig, FamilyConfig, RouterFamilyConfig
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.model.lora import with_adapters
from moe.parallel import LayerOptions

WIDE = AdaptersConfig(
    attention=DenseFamilyConfig(mode="lora", r=5, alpha=12.0),
    experts=ExpertFamilyConfig(mode="lora", r=4, alpha=6.0, rslora=True),
    vision_blocks=DenseFamilyConfig(mode="lora", r=3, alpha=7.0),
    router=RouterFamilyConfig(mode="full"),
)
FULL = AdaptersConfig(  # everything that can be kept in full, and a router's LoRA
    attention=DenseFamilyConfig(mode="full"),
    experts=ExpertFamilyConfig(mode="full"),
    router=RouterFamilyConfig(mode="lora", r=7, alpha=9.0),
    merger=DenseFamilyConfig(mode="lora", r=6, alpha=9.0),
    deepstack_mergers=DenseFamilyConfig(mode="full"),
    **{family: FamilyConfig(mode="full") for family in ("patch_embed", "pos_embed", "norms", "embeddings", "head")},
)
DENSE = AdaptersConfig(
    attention=DenseFamilyConfig(mode="lora", r=5, alpha=12.0),
    mlp=DenseFamilyConfig(mode="lora", r=4, alpha=4.0, rslora=True),
    merger=DenseFamilyConfig(mode="full"),
)
FULL_ONLY = AdaptersConfig(merger=DenseFamilyConfig(mode="full"), norms=FamilyConfig(mode="full"))


def made(base: Path, config: AdaptersConfig, *, ep: int = 1, resident: bool = True) -> EmptyModel:
    options = ModelOptions(
        ep_size=ep, layer=LayerOptions(resident=resident, seed=3), resident=resident, dtype=torch.float32
    )
    return build(base, with_adapters(config, options))


def tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    return bool((first - second).abs().max() <= tolerance * second.abs().max())

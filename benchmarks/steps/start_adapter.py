"""The initial adapter of both sides of `train-step`: LoRA on attention and experts, with non-zero factors."""

from pathlib import Path

import torch
import torch.distributed as dist

from finetune.adapters.write_trained import write_adapter
from finetune.config import AdaptersConfig, DensePartConfig, ExpertPartConfig
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import ModelOptions
from finetune.model.lora import with_adapters
from finetune.model.weights import load_weights

ADAPTERS = AdaptersConfig(
    attention=DensePartConfig(mode="lora", r=8, alpha=16.0), experts=ExpertPartConfig(mode="lora", r=8, alpha=16.0)
)


def start_adapter(base: Path) -> None:
    """Write the adapter to the folder `start` next to the base's folder."""
    assert dist.get_world_size() == 1
    empty = build(base, with_adapters(ADAPTERS, ModelOptions(dtype=torch.float32)))
    load_weights(empty, open_base(base, empty.expected))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in empty.trained:
            if "lora_B" in name:
                parameter = empty.module.get_parameter(name)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    write_adapter(empty, base.parent / "start", base=str(base))

"""A model without weights: the options it is built with, and its description."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from finetune.architecture.shapes import Shape
from finetune.architecture.yarn import Extension
from finetune.settings.attention import AttentionName
from moe.experts import ExpertLora as Lora
from moe.kernels.packed import Bits
from moe.names import LAYERS as KNOWN
from moe.names import canonical_name, dense_name
from moe.parallel import LayerOptions


def bits_of(setting: Literal["none", "int8", "nf4"]) -> Bits | None:
    """Return the form that a key of `model.quantise` names; None for `none`."""
    return None if setting == "none" else setting


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for building a model. `train` names the dense parts to train in full; `layer` has the others."""

    ep_size: int = 1
    layer: LayerOptions = field(default_factory=LayerOptions)
    train: Collection[str] = ()
    lora: Mapping[str, Lora] = field(default_factory=dict)
    """Adapters of dense parts, by part; those of experts and routers are in `layer`."""
    resident: bool = True
    dtype: torch.dtype = torch.bfloat16
    dense_bits: Bits | None = None
    """The form of the frozen matrices of attention and MLPs; that of experts is in `layer`."""
    attention: AttentionName = "sdpa"
    context: Extension | None = None


@dataclass(frozen=True, kw_only=True)
class EmptyModel:
    """A model on meta, and the contents of its checkpoint: canonical name -> shape in memory."""

    module: nn.Module
    expected: Mapping[str, Shape]
    model_type: str
    tied_head: bool
    seed: int
    lora: Mapping[str, Lora]
    trained: tuple[str, ...]
    """Our names of the parameters that train; a stage may pause some of them."""
    context: Extension | None = None
    """How the base's context is extended; an export writes it to its config.json."""

    def canonical(self, name: str) -> str:
        """Return the canonical name of one of our parameters or persistent buffers."""
        return canonical_name(self.model_type, name) if self.model_type in KNOWN else dense_name(name)

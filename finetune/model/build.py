"""Builds the model without weights: on meta, with its sparse blocks replaced, trainable parts chosen, the rest frozen.

Nothing here allocates a weight, so a laptop can build the 235B model; `weights.py` then fills it from the base's files.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from finetune.architecture.parts import QUANTISED_DENSE
from finetune.architecture.shapes import HEAD, part_of
from finetune.architecture.yarn import Extension
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.model.lora import inject
from finetune.model.resident import make_resident
from finetune.model.varlen import register
from moe.kernels.linear import PackedLinear, Workspace
from moe.kernels.packed import Bits, Packing
from moe.names import LAYERS as KNOWN
from moe.parallel import BalanceCall, replace_moe_blocks

DENSE = ("qwen3_vl", "qwen3")


def build(folder: Path, options: ModelOptions, *, balance: BalanceCall | None = None) -> EmptyModel:
    """Build the model that a folder's config.json describes, on meta; every rank must call this.

    With `resident`, frozen parameters become buffers, which the engine does not partition.
    """
    config = AutoConfig.from_pretrained(folder)
    extend(config, options.context)
    kind = str(config.model_type)
    if kind not in (*KNOWN, *DENSE):
        known = ", ".join((*KNOWN, *DENSE))
        raise ValueError(f"{folder}: model_type in its config.json must be one of {known}, got {kind!r}")
    module = _on_meta(config, options)
    # until the blocks are replaced, the model has canonical names; a tied head appears once, as the embedding
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    tied_head = HEAD not in expected
    _check_asked(folder, {part_of(name) for name in expected}, options)
    workspace = Workspace()
    inject(module, expected, options.lora)  # first, because PEFT freezes everything, the new blocks' factors too
    if kind in KNOWN:
        replace_moe_blocks(module, ep_size=options.ep_size, options=options.layer, balance=balance, workspace=workspace)
    elif options.ep_size != 1:
        raise ValueError(f"parallel.ep: {options.ep_size}, but {kind} in {folder} has no experts. Set parallel.ep=1")
    empty = EmptyModel(
        module=module,
        expected=expected,
        model_type=kind,
        tied_head=tied_head,
        seed=options.layer.seed,
        lora=options.lora,
        trained=(),
        context=options.context,
    )
    _settle_training(empty, options.train)
    if options.dense_bits is not None:
        _pack_linears(empty, options.dense_bits, workspace)
    if options.resident:
        make_resident(module)
    trained = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    return replace(empty, trained=trained)


def extend(config: Any, context: Extension | None) -> None:
    """Extend the positions of a transformers config by YaRN; theta and the sections stay."""
    if context is None:
        return
    text = config.get_text_config()
    text.rope_parameters = {
        **text.rope_parameters,
        "rope_type": "yarn",
        "factor": context.factor,
        "original_max_position_embeddings": context.original,
    }
    text.max_position_embeddings = context.length


def _on_meta(config: PreTrainedConfig, options: ModelOptions) -> nn.Module:
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    register()
    attention = "kernel" if options.attention == "flash_attention_2" else options.attention
    with torch.device("meta"):
        module: nn.Module = kind.from_config(config, dtype=options.dtype, attn_implementation=attention)
    return module


def _check_asked(folder: Path, parts: Collection[str], options: ModelOptions) -> None:
    """Raise ValueError if experts or routers train in a model without them; dense parts are checked elsewhere."""
    modes = {"experts": options.layer.experts, "router": options.layer.router.mode}
    missing = [part for part, mode in modes.items() if mode != "frozen" and part not in parts]
    if missing:
        raise ValueError(
            f"adapters.{missing[0]}.mode: {modes[missing[0]]}, but the model in {folder} is dense and has no "
            f"{missing[0]}. Adapt or train mlp instead"
        )


def _settle_training(empty: EmptyModel, train: Collection[str]) -> None:
    """Freeze everything except the parts in `train`, adapters, and the experts and routers, whose layers decide."""
    parts = {name: part_of(name) for name in empty.expected}
    unknown = sorted(set(train) - set(parts.values()) - {"head"})
    if unknown:
        raise ValueError(f"parts to train: {', '.join(unknown)} not in this model; it has {', '.join(_order(parts))}")
    if empty.tied_head and {"head", "embeddings"} & set(train):
        raise ValueError(
            "this base ties its head and its embedding (tie_word_embeddings: true), so training either would change "
            "both. Train other parts, or adapt the attention"
        )
    for name, parameter in empty.module.named_parameters():
        canonical = empty.canonical(name)
        if parts.get(canonical) not in ("experts", "router", None):
            parameter.requires_grad_(parts[canonical] in train)


def _pack_linears(empty: EmptyModel, bits: Bits, workspace: Workspace) -> None:
    """Replace the decoder's linear layers, also those inside of LoRA layers, by packed ones."""
    for name, layer in list(empty.module.named_modules()):
        if isinstance(layer, nn.Linear) and part_of(empty.canonical(f"{name}.weight")) in QUANTISED_DENSE:
            if ".lora_" in name:
                continue
            if layer.weight.requires_grad:
                part = part_of(empty.canonical(f"{name}.weight"))
                raise ValueError(f"{part} trains in full and cannot be quantised to {bits}: freeze it, or adapt it")
            packing = Packing(bits=bits, out=layer.out_features, into=layer.in_features)
            empty.module.set_submodule(name, PackedLinear(packing, layer.bias, workspace))


def _order(parts: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(parts.values()))

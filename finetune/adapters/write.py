"""Write adapters from changes of any origin: in PEFT's packed form, or with 2-D keys for each expert."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor

from finetune.adapters.card import PartLine
from finetune.adapters.keys import CARD, CONFIG, WEIGHTS, packed_module
from finetune.architecture.shapes import Shape, is_expert_stack, other_stack, part_of
from finetune.files.atomic import whole_folder, write_file
from finetune.files.tensorfile import reserve, tensor_bytes, torch_type
from finetune.model.lora import peft_config
from moe.experts import ExpertLora as Lora
from moe.names import PEFT_PREFIX
from moe.packing import pack_lora

OutForm = Literal["peft", "per-expert"]
FORMS: tuple[OutForm, ...] = ("peft", "per-expert")


@dataclass(frozen=True, kw_only=True)
class OutChange:
    """A low-rank change to write. `read` returns A [E, r, in] and B [E, out, r] in `dtype`; E is 1 for a matrix."""

    target: str
    shape: Shape
    r: int
    scale: float
    dtype: str
    read: Callable[[], tuple[Tensor, Tensor]]

    @property
    def experts(self) -> int:
        """Number of matrices in the base tensor."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True, kw_only=True)
class OutFull:
    """A base tensor to write in full."""

    target: str
    shape: Shape
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class OutAdapter:
    """The complete content of an adapter folder."""

    changes: Sequence[OutChange]
    full: Sequence[OutFull]
    base: str
    metadata: Mapping[str, str]
    card: bytes
    form: OutForm


def write_adapter_folder(
    adapter: OutAdapter, folder: Path, *, check: Callable[[Path], None] = lambda path: None
) -> int:
    """Write the folder and return the bytes of its tensors; only one base tensor's factors are in memory at a time.

    `check` is called on the finished files before the folder gets its name.
    """
    kinds = {name: entry for change in adapter.changes for name, entry in _names(change, adapter.form).items()}
    kinds |= {PEFT_PREFIX + full.target: (full.dtype, full.shape) for full in adapter.full}
    with whole_folder(folder) as beside:
        with reserve(beside / WEIGHTS, kinds, {"format": "pt", **adapter.metadata}) as file:
            for name, tensor in _tensors(adapter):
                assert tuple(tensor.shape) == file.tensors[name].shape, name
                file.put(name, tensor)
        write_file(beside / CONFIG, _config(adapter))
        write_file(beside / CARD, adapter.card)
        check(beside)
    return tensor_bytes(kinds)


def with_both_stacks(changes: Sequence[OutChange]) -> list[OutChange]:
    """Add a zero change where a layer adapts only one of its two expert stacks: readers require both."""
    targets = {change.target for change in changes}
    zeros = [
        _zero(other_stack(change.target), change)
        for change in changes
        if is_expert_stack(change.target) and other_stack(change.target) not in targets
    ]
    return [*changes, *zeros]


def card_lines(changes: Sequence[OutChange], full: Sequence[OutFull]) -> list[PartLine]:
    """Return the rows of the card's table, one per part and way of training."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for change in changes:
        key = (part_of(change.target), f"lora of r {change.r}, scale {change.scale:g}")
        sizes.setdefault(key, []).append(change.experts * change.r * sum(change.shape[-2:]))
    for tensor in full:
        sizes.setdefault((part_of(tensor.target), "full"), []).append(math.prod(tensor.shape))
    return [
        PartLine(part=part, how=how, tensors=len(each) * (1 if how == "full" else 2), parameters=sum(each))
        for (part, how), each in sizes.items()
    ]


def _zero(target: str, other: OutChange) -> OutChange:
    """A zero change to one stack of a layer, with the rank and scale of the other stack's change."""
    experts, out, into = other.shape
    shape = (experts, into, out // 2) if target.endswith("down_proj") else (experts, 2 * into, out)
    dtype = torch_type(other.dtype)

    def read() -> tuple[Tensor, Tensor]:
        a = torch.zeros(experts, other.r, shape[2], dtype=dtype)
        return a, torch.zeros(experts, shape[1], other.r, dtype=dtype)

    return OutChange(target=target, shape=shape, r=other.r, scale=other.scale, dtype=other.dtype, read=read)


def _names(change: OutChange, form: OutForm) -> dict[str, tuple[str, Shape]]:
    """The (dtype, shape) of a change's tensors in the file, by key."""
    out, into = change.shape[-2:]
    if not is_expert_stack(change.target):
        return _pair(change.target.removesuffix(".weight"), change.dtype, change.r, into, out)
    if form == "peft":
        rows = change.r * change.experts
        return _pair(packed_module(change.target), change.dtype, rows, into, out)
    kinds: dict[str, tuple[str, Shape]] = {}
    for expert in range(change.experts):
        for module, rows in _single_modules(change, expert):
            kinds |= _pair(module, change.dtype, change.r, into, rows)
    return kinds


def _pair(module: str, dtype: str, r: int, into: int, out: int) -> dict[str, tuple[str, Shape]]:
    stem = f"{PEFT_PREFIX}{module}.lora_"
    return {f"{stem}A.weight": (dtype, (r, into)), f"{stem}B.weight": (dtype, (out, r))}


def _single_modules(change: OutChange, expert: int) -> list[tuple[str, int]]:
    """The modules of one expert in a stack, each with the number of its output rows."""
    experts, _, kind = change.target.rpartition(".")
    out = change.shape[1]
    projections = [("down_proj", out)] if kind == "down_proj" else [("gate_proj", out // 2), ("up_proj", out // 2)]
    return [(f"{experts}.{expert}.{projection}", rows) for projection, rows in projections]


def _tensors(adapter: OutAdapter) -> Iterator[tuple[str, Tensor]]:
    for change in adapter.changes:
        a_Eri, b_Eor = change.read()
        if not is_expert_stack(change.target):
            yield from _two(change.target.removesuffix(".weight"), a_Eri[0], b_Eor[0])
        elif adapter.form == "peft":
            yield from _two(packed_module(change.target), *pack_lora(a_Eri, b_Eor))
        else:
            for expert in range(change.experts):
                top = 0
                for module, rows in _single_modules(change, expert):
                    yield from _two(module, a_Eri[expert], b_Eor[expert, top : top + rows])
                    top += rows
    for full in adapter.full:
        yield PEFT_PREFIX + full.target, full.read()


def _two(module: str, a: Tensor, b: Tensor) -> Iterable[tuple[str, Tensor]]:
    return ((f"{PEFT_PREFIX}{module}.lora_A.weight", a), (f"{PEFT_PREFIX}{module}.lora_B.weight", b))


def _config(adapter: OutAdapter) -> bytes:
    """PEFT's config: modules and parameters by full path, with one pattern per rank and scale."""
    targets: dict[str, list[str]] = {}
    parameters: dict[str, list[str]] = {}
    lora: dict[str, Lora] = {}
    for change in adapter.changes:
        key = f"r {change.r}, scale {change.scale!r}"
        lora[key] = lora[f"bare, {key}"] = Lora(r=change.r, alpha=change.scale * change.r)
        if is_expert_stack(change.target) and adapter.form == "per-expert":
            names = [module for expert in range(change.experts) for module, _ in _single_modules(change, expert)]
            targets.setdefault(key, []).extend(names)
        elif is_expert_stack(change.target) or change.target.endswith(".mlp.gate.weight"):
            parameters.setdefault(f"bare, {key}", []).append(change.target)
        else:
            targets.setdefault(key, []).append(change.target.removesuffix(".weight"))
    config = peft_config(targets, lora, parameters=parameters)
    config.base_model_name_or_path, config.inference_mode = adapter.base, True
    config.modules_to_save = sorted({full.target.rpartition(".")[0] for full in adapter.full}) or None
    if adapter.form == "per-expert":  # servers compare only the last component of a module's name
        config.target_modules = {name.rpartition(".")[2] for names in targets.values() for name in names}
    return config_bytes(config)


def config_bytes(config: LoraConfig) -> bytes:
    """Return the text of adapter_config.json, with sets sorted."""
    values: dict[str, Any] = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

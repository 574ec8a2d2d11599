"""Read the adapter of any tool as changes to a base's tensors: ours, PEFT's, or 2-D keys for each expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapters.change import Change
from finetune.adapters.forms import FileContext, Pair, changes_of, check_full
from finetune.adapters.keys import (
    CHANGES_KEY,
    CONFIG,
    ORIENTATION_KEY,
    SINGLE_FORM,
    WEIGHTS,
    Key,
    check_config,
    check_numbers,
    parse_key,
)
from finetune.adapters.targets import check_targets, missing_targets
from finetune.architecture.shapes import Shape
from finetune.files.basefiles import BaseFiles
from finetune.files.jsonblock import load_json
from finetune.files.tensorfile import Stored, read_header, read_tensor
from moe.names import PEFT_PREFIX

_COPY = ".base_layer."


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """All changes of an adapter, by canonical base name: low-rank changes and full tensors."""

    folder: Path
    changes: Mapping[str, Change]
    full: Mapping[str, Stored]
    copies: Mapping[str, Stored]
    """Tensors of the base itself, which PEFT saves along with the factors of a head."""
    metadata: Mapping[str, str]
    config: Mapping[str, Any]

    def read_full(self, name: str) -> Tensor:
        """Return a tensor that replaces the base's, in the in-memory layout."""
        return read_tensor(self.full[name])

    def check_copies(self, base: BaseFiles) -> None:
        """Raise unless the copies of base tensors in the file equal those of the base."""
        for name, stored in self.copies.items():
            if not torch.equal(read_tensor(stored).float(), base.read(name).float()):
                raise ValueError(
                    f"{self.folder} holds a copy of {name} (PEFT saves one with a head's factors) with other values "
                    f"than {base.folder} has: the adapter was trained on another base, or the copy was trained too. "
                    f"Give that base, or merge the adapter with the tool that made it"
                )


def open_source(folder: Path, shapes: Mapping[str, Shape] | None = None) -> AdapterSource:
    """Open an adapter of any known form by its headers alone, and check it against a base's `shapes` if given.

    Raise one error if anything is unknown or does not fit; nothing in the file is ignored.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no adapter: {name} is missing{_hint(folder)}")
    stored, metadata = read_header(folder / WEIGHTS)
    config = load_json(folder / CONFIG)
    check_config(config, folder)
    check_numbers(config, folder / CONFIG)
    names = {*(shapes or {}), *(name.rpartition(".lora_")[0] or name for name in stored)}
    names |= {name.removesuffix(".weight").removeprefix(PEFT_PREFIX) for name in names}
    check_targets(config, names, folder / CONFIG)
    parsed = {name: parse_key(name, folder) for name in stored}
    not_factors = {key: stored[name] for name, key in parsed.items() if isinstance(key, str)}
    copies = {key.replace(_COPY, "."): tensor for key, tensor in not_factors.items() if _COPY in key}
    full = {key: tensor for key, tensor in not_factors.items() if _COPY not in key}
    factors = {key: stored[name] for name, key in parsed.items() if isinstance(key, Key)}
    context = FileContext(folder=folder, config=config, metadata=metadata, shapes=shapes)
    changes = changes_of(context, _pairs(factors, folder))
    if not changes and not full:
        raise ValueError(f"{folder} changes nothing: {WEIGHTS} holds no tensor")
    for name, tensor in [*full.items(), *copies.items()]:
        check_full(context, name, tensor)
    if metadata.get(ORIENTATION_KEY, "").startswith(SINGLE_FORM):  # its targets also match modules that it lacks
        missing: list[str] = []
        if metadata.get(CHANGES_KEY, count := str(len(changes))) != count:
            raise ValueError(
                f"{folder} is incomplete: it was exported with {metadata[CHANGES_KEY]} changes and has {count}. "
                f"Export it again"
            )
    else:
        missing = missing_targets(config, shapes or {}, {*changes, *full})
    if missing:
        raise ValueError(
            f"{folder} is incomplete: {CONFIG} says that {missing[0]} is adapted, but {WEIGHTS} has no factors for it"
            f"{f', nor for {len(missing) - 1} more' if len(missing) > 1 else ''}. Some tools save only the part of one "
            f"rank or stage: save it again, or list the missing modules in exclude_modules"
        )
    order = {name: at for at, name in enumerate(shapes or {})}
    ordered = dict(sorted(changes.items(), key=lambda item: order.get(item[0], 0)))
    return AdapterSource(
        folder=folder,
        changes=ordered,
        full=full,
        copies=copies,
        metadata=metadata,
        config=config,
    )


def require_finite(folder: Path) -> None:
    """Raise if an adapter holds NaN or infinity: attention on a CPU hides them, and answers become meaningless."""
    for name, stored in read_header(folder / WEIGHTS)[0].items():
        if not bool(torch.isfinite(read_tensor(stored)).all()):
            raise ValueError(f"{folder}: {name} holds NaN or infinity; the run diverged before it was saved")


def _hint(folder: Path) -> str:
    if (folder / "adapter" / CONFIG).is_file():
        return f"; {folder / 'adapter'} has one"
    if (folder / "adapter_model.bin").is_file():
        return "; adapter_model.bin is not supported, convert it to safetensors"
    return ""


def _pairs(factors: Mapping[Key, Stored], folder: Path) -> dict[Key, Pair]:
    """The factors (A, B) of each module, by the key of one of them."""
    by_module: dict[str, dict[str, Stored]] = {}
    keys: dict[str, Key] = {}
    for key, tensor in factors.items():
        by_module.setdefault(key.module, {})[key.factor] = tensor
        keys[key.module] = key
    for module, pair in by_module.items():
        if len(pair) != 2:
            raise ValueError(f"{folder}: {module} has only lora_{next(iter(pair))}; the file is incomplete")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.dtype != b.dtype:
            raise ValueError(
                f"{folder}: {module} has lora_A {a.dtype} {list(a.shape)} and lora_B {b.dtype} {list(b.shape)}; they "
                f"must be [r, in] and [out, r] of one type"
            )
    return {keys[module]: (pair["A"], pair["B"]) for module, pair in by_module.items()}

"""Reads any tool's adapter as changes of a base's tensors: ours, PEFT's, or 2-D keys expert by expert."""

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
    """Everything that an adapter changes, by canonical names of the base: low-rank changes, and tensors in full."""

    folder: Path
    changes: Mapping[str, Change]
    full: Mapping[str, Stored]
    copies: Mapping[str, Stored]
    """Tensors of the base itself, which PEFT writes down beside the factors of a head."""
    metadata: Mapping[str, str]
    config: Mapping[str, Any]

    def read_full(self, name: str) -> Tensor:
        """Return a tensor that replaces the base's, as it lies in memory."""
        return read_tensor(self.full[name])

    def check_copies(self, base: BaseFiles) -> None:
        """Raise unless what the file repeats of the base is what the base has."""
        for name, stored in self.copies.items():
            if not torch.equal(read_tensor(stored).float(), base.read(name).float()):
                raise ValueError(
                    f"{self.folder} holds a copy of {name} (PEFT saves one beside a head's factors) with other values "
                    f"than {base.folder} has: it was trained on another base, or the copy was trained too. Give that "
                    f"base, or merge it with the tool that made it"
                )


def open_source(folder: Path, shapes: Mapping[str, Shape] | None = None) -> AdapterSource:
    """Return an adapter of any known form, from headers alone, checked against a base's `shapes` where they are given.

    Raises one error about what is not understood or does not fit; nothing in a file is ignored.
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
    if metadata.get(ORIENTATION_KEY, "").startswith(SINGLE_FORM):  # its targets are last words, of other modules too
        missing: list[str] = []
        if metadata.get(CHANGES_KEY, count := str(len(changes))) != count:
            raise ValueError(
                f"{folder} is not whole: it was exported with {metadata[CHANGES_KEY]} changes and has {count}. "
                f"Export it again"
            )
    else:
        missing = missing_targets(config, shapes or {}, {*changes, *full})
    if missing:
        raise ValueError(
            f"{folder} is not whole: {CONFIG} says that {missing[0]} is adapted, and {WEIGHTS} has no factors for it"
            f"{f', nor for {len(missing) - 1} more' if len(missing) > 1 else ''}. Some tools save one rank's or one "
            f"stage's part: save it again, or name what it lacks in exclude_modules"
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
    """Raise where an adapter holds NaN or infinity: attention on a CPU hides it, and the answers are meaningless."""
    for name, stored in read_header(folder / WEIGHTS)[0].items():
        if not bool(torch.isfinite(read_tensor(stored)).all()):
            raise ValueError(f"{folder}: {name} holds NaN or infinity; the run diverged before it was saved")


def _hint(folder: Path) -> str:
    if (folder / "adapter" / CONFIG).is_file():
        return f"; {folder / 'adapter'} is one"
    if (folder / "adapter_model.bin").is_file():
        return "; adapter_model.bin is not read, convert it to safetensors"
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
            raise ValueError(f"{folder}: {module} has lora_{next(iter(pair))} only; the file is not whole")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.dtype != b.dtype:
            raise ValueError(
                f"{folder}: {module} has lora_A {a.dtype} {list(a.shape)} and lora_B {b.dtype} {list(b.shape)}; wanted "
                f"are [r, in] and [out, r] of one type"
            )
    return {keys[module]: (pair["A"], pair["B"]) for module, pair in by_module.items()}

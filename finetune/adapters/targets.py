"""What an adapter's config says is adapted, by PEFT's own rules, compared with what its file has. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from finetune.architecture.shapes import Shape, is_expert_stack


def missing_targets(config: Mapping[str, Any], shapes: Mapping[str, Shape], changed: Collection[str]) -> list[str]:
    """Return tensors of a base that the config adapts and the file does not change: one rank or stage saved its part.

    Modules that are kept in full are not among PEFT's targets. With `layers_pattern`, nothing is reported.
    """
    if config.get("layers_pattern"):
        return []
    targets, excluded, bare = (
        config[key] if isinstance(config.get(key), str) else frozenset(config.get(key) or ())
        for key in ("target_modules", "exclude_modules", "target_parameters")
    )
    layers = config.get("layers_to_transform")
    layers = {layers} if isinstance(layers, int) else set(layers or ())
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in config.get("modules_to_save") or ()]
    full = {name.rpartition(".")[0] for name in changed}
    stacks = {name.rpartition(".")[2] for name in changed if is_expert_stack(name)}
    by_expert = not bare and not layers  # then no name of a target is that of a stack
    missing = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name in changed or len(shape) < 2 or module in full:
            continue
        adapted = module != name and _named(targets, module) and _within(layers, module)
        adapted = adapted and not _named(excluded, module) and not any(pattern.match(module) for pattern in saved)
        by_expert_elsewhere = by_expert and is_expert_stack(name) and name.rpartition(".")[2] in stacks
        if adapted or by_expert_elsewhere or _named(bare, name):
            missing.append(name)
    return missing


def _within(layers: Collection[int], module: str) -> bool:
    layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return not layers or (layer is not None and int(layer[1]) in layers)


def _named(targets: str | frozenset[str], name: str) -> bool:
    """A string is a regular expression of full names; a list has names and ends of names."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, name) is not None
    words = name.split(".")
    return any(".".join(words[at:]) in targets for at in range(len(words)))

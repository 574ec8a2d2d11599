"""Compare the targets in an adapter's config, by PEFT's own rules, with the tensors in its file. Loads no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.architecture.shapes import Shape, is_expert_stack

_EXPRESSIONS = ("target_modules", "exclude_modules", "target_parameters")
_SECONDS = 30.0
_REPEATED_GROUP, _UNBOUNDED = re.compile(r"\)\s*[*+{]"), re.compile(r"[*+]|,\}")
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        for form in (pattern, rf"(.*\\.)?({pattern})$", rf"(^|.*\\.){pattern}($|\\..*)"):
            re.fullmatch(form, name)
"""


def check_targets(config: Mapping[str, Any], names: Iterable[str], where: Path) -> None:
    """Raise unless the config's targets are names, or expressions that quickly match against `names`."""
    for key in (*_EXPRESSIONS, "modules_to_save"):
        value = config.get(key)
        is_text = key in _EXPRESSIONS and isinstance(value, str)
        if not (value is None or is_text or (isinstance(value, list) and _all(value, str))):
            raise ValueError(
                f"{where}: {key} is {str(value)[:80]}; it must be a list of names, or for targets one regular "
                f"expression. The file is damaged: get it again"
            )
    layers = config.get("layers_to_transform")
    if not (layers is None or _all(layers if isinstance(layers, list) else [layers], int)):
        raise ValueError(
            f"{where}: layers_to_transform is {str(layers)[:80]}; it must be a number or a list of numbers. The "
            f"file is damaged: get it again"
        )
    texts = [value for key in _EXPRESSIONS if isinstance(value := config.get(key), str)]
    kinds = ("rank_pattern", "alpha_pattern", "modules_to_save")  # PEFT reads all their names as expressions
    patterns = [*texts, *(pattern for kind in kinds for pattern in config.get(kind) or ())]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r} is not a valid regular expression: {error}") from error
    _require_quick(patterns, names, where)


def _all(values: Iterable[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _require_quick(patterns: Iterable[str], names: Iterable[str], where: Path) -> None:
    """Raise if matching takes too long. It runs in another process, since a running match cannot be interrupted."""
    doubtful = [each for each in patterns if _REPEATED_GROUP.search(each) or len(_UNBOUNDED.findall(each)) > 2]
    if not doubtful:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", _TRY],
            input=json.dumps([doubtful, sorted(set(names))]),
            text=True,
            timeout=_SECONDS,
            capture_output=True,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{where}: {', '.join(map(repr, doubtful))[:200]} cannot be matched against the names of a model's tensors "
            f"in {_SECONDS:g} s. Use plain names, or an expression that repeats no group"
        ) from error


def missing_targets(config: Mapping[str, Any], shapes: Mapping[str, Shape], changed: Collection[str]) -> list[str]:
    """Return base tensors that the config adapts but the file does not change, as if only one rank had saved its part.

    Modules that are saved in full are not among PEFT's targets. With `layers_pattern`, nothing is reported.
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
    by_expert = not bare and not layers  # then no target names a stack
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
    """Return whether targets match a name: a string is a regular expression, a list has names or their endings."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, name) is not None
    words = name.split(".")
    return any(".".join(words[at:]) in targets for at in range(len(words)))

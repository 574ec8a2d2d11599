"""The card of a base: is it complete, does it match its family, and do we compute the same with it as transformers?

Weights are streamed (finetune/verify/streaming.py), one layer at a time, so that the largest model fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.architecture.families import Family, family, family_names
from finetune.files.basefiles import BaseFiles, open_base
from finetune.files.fp8 import require_sound_scales
from finetune.files.hub import require_files
from finetune.files.hubconfig import hub_config, read_family
from finetune.verify.card import Check


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the checks by computation, and the family that the base should be."""

    family: str = ""
    layout: str = "auto"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compute: bool = True


def verify_base(folder: Path, options: Options = Options()) -> Iterator[Check]:
    """Yield every check in order, as soon as its result is known; expensive ones come last."""
    if options.family:
        family(options.family)  # an unknown family is an error of the caller, not a failed check of the base
    files_ok, config_ok = True, True
    weights = None
    try:
        require_files(folder)
        yield Check(name="files", status="pass", detail="config, tokenizer and processor files are present")
    except ValueError as error:
        files_ok = False
        yield Check(name="files", status="fail", detail=str(error))
    try:
        model = read_family(folder)
        yield check_config(model, options.family)
    except ValueError as error:
        config_ok = False
        yield Check(name="config", status="fail", detail=str(error))
    try:
        weights = open_base(folder, layout=options.layout) if config_ok else None
        if weights is not None:
            require_sound_scales(weights.scales.values())
            yield _weights_line(weights)
    except ValueError as error:
        weights = None
        yield Check(name="weights", status="fail", detail=str(error))
    if files_ok and config_ok:
        from finetune.verify.text import check_processor, check_template, check_tokenizer

        for check in (check_tokenizer, check_template, check_processor):
            yield _guarded(check, folder, model)
    yield from _computing(folder, weights if files_ok else None, options)


def check_config(model: Family, name: str = "") -> Check:
    """Compare a config.json with the family table: with the entry `name` if given, else by its dimensions."""
    name = name or next((entry for entry in family_names() if _has_size_of(family(entry), model)), "")
    if not name:
        sizes = f"{model.text.num_hidden_layers} layers of {model.text.hidden_size}"
        detail = f"consistent, but no published size has its dimensions ({sizes})"
        return Check(name="config", status="note", detail=detail)
    entry = family(name)
    differences = _differences(hub_config(model), hub_config(entry))
    if differences:
        return Check(name="config", status="fail", detail=f"differs from {entry.name}: {'; '.join(differences)}")
    return Check(name="config", status="pass", detail=f"every value is that of {entry.name}")


def _has_size_of(entry: Family, model: Family) -> bool:
    """Return whether to compare a model with this entry: a published size of its dimensions, or an equal tiny model."""
    if entry.hub_id is None:
        return hub_config(entry) == hub_config(model)
    return _dimensions(entry) == _dimensions(model)


def _dimensions(model: Family) -> tuple[int, int, bool]:
    return model.text.num_hidden_layers, model.text.hidden_size, model.is_moe


def _differences(config: dict[str, object], expected: dict[str, object], prefix: str = "") -> list[str]:
    differences = []
    for key in sorted(config.keys() | expected.keys()):
        value, published = config.get(key), expected.get(key)
        if isinstance(value, dict) and isinstance(published, dict):
            differences += _differences(value, published, f"{prefix}{key}.")
        elif value != published:
            differences.append(f"{prefix}{key} is {value}, not {published}")
    return differences


def _weights_line(weights: BaseFiles) -> Check:
    stored = [*weights.stored.values(), *weights.scales.values()]
    size = sum(tensor.size for tensor in stored)
    count = len({tensor.file for tensor in stored})
    kinds = ", ".join(sorted({tensor.dtype for tensor in stored}))
    files = "1 file" if count == 1 else f"{count} files"
    form = f", {weights.quantised}" if weights.quantised else ""
    detail = f"{len(stored)} tensors, {size:,} bytes of {kinds} in {files}, layout {weights.layout}{form}"
    return Check(name="weights", status="pass", detail=detail)


def _guarded(check: Callable[[Path, Family], Check], folder: Path, model: Family) -> Check:
    """Run a check; a broken file of the user's makes it fail, and the other checks still run."""
    try:
        return check(folder, model)
    except ValueError as error:
        return Check(name=check.__name__.removeprefix("check_"), status="fail", detail=str(error))


def _computing(folder: Path, weights: BaseFiles | None, options: Options) -> Iterator[Check]:
    names = ("logits", "video layout")
    if not options.compute or weights is None:
        why = "skipped by --no-compute" if not options.compute else "needs valid files, config and weights"
        yield from (Check(name=name, status="skip", detail=why) for name in names)
        return
    from finetune.verify.compute import compute_checks

    yield from compute_checks(folder, weights, device=options.device, dtype_name=options.dtype)

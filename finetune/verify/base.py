"""One card for a base: is it complete, is it what it claims, do we compute with it what transformers computes?

Weights are streamed (finetune/verify/streaming.py), one layer at a time, so that the largest model fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.architecture.families import Family, family, family_names
from finetune.files.basefiles import BaseFiles, open_base
from finetune.files.hub import require_files
from finetune.files.hubconfig import hub_config, read_family
from finetune.verify.card import Check


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the computing checks run, and which family the base should be."""

    family: str = ""
    layout: str = "auto"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compute: bool = True


def verify_base(folder: Path, options: Options = Options()) -> Iterator[Check]:
    """Yield every check in order, each as soon as its result is known; heavy ones last."""
    if options.family:
        family(options.family)  # a name that is no family's is the caller's mistake, not the base's
    files_ok, config_ok = True, True
    weights = None
    try:
        require_files(folder)
        yield Check(name="files", status="pass", detail="config, tokenizer and processor files are there")
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
            yield _weights_line(weights)
    except ValueError as error:
        yield Check(name="weights", status="fail", detail=str(error))
    if files_ok and config_ok:
        from finetune.verify.text import check_processor, check_template, check_tokenizer

        for check in (check_tokenizer, check_template, check_processor):
            yield _guarded(check, folder, model)
    yield from _computing(folder, weights if files_ok else None, options)


def check_config(model: Family, name: str = "") -> Check:
    """Compare a config.json with the family table: by name where one is given, else by the dimensions it shares."""
    name = name or next((entry for entry in family_names() if _has_size_of(family(entry), model)), "")
    if not name:
        sizes = f"{model.text.num_hidden_layers} layers of {model.text.hidden_size}"
        detail = f"consistent, but no published size has its dimensions ({sizes})"
        return Check(name="config", status="note", detail=detail)
    entry = family(name)
    differences = _differences(hub_config(model), hub_config(entry))
    if differences:
        return Check(name="config", status="fail", detail=f"unlike {entry.name}: {'; '.join(differences)}")
    return Check(name="config", status="pass", detail=f"every value is {entry.name}'s")


def _has_size_of(entry: Family, model: Family) -> bool:
    """Whether a model is compared with this entry: a published size of its dimensions, or a toy that it equals."""
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
    size = sum(tensor.size for tensor in weights.stored.values())
    count = len({tensor.file for tensor in weights.stored.values()})
    kinds = ", ".join(sorted({tensor.dtype for tensor in weights.stored.values()}))
    detail = f"{len(weights.stored)} tensors, {size:,} bytes of {kinds} in {count} file(s), layout {weights.layout}"
    return Check(name="weights", status="pass", detail=detail)


def _guarded(check: Callable[[Path, Family], Check], folder: Path, model: Family) -> Check:
    """Make a check, for which a user's broken file is a failed line, not the end of the card."""
    try:
        return check(folder, model)
    except ValueError as error:
        return Check(name=check.__name__.removeprefix("check_"), status="fail", detail=str(error))


def _computing(folder: Path, weights: BaseFiles | None, options: Options) -> Iterator[Check]:
    names = ("logits", "video layout")
    if not options.compute or weights is None:
        why = "not asked for (--no-compute)" if not options.compute else "needs whole files, config and weights"
        yield from (Check(name=name, status="skip", detail=why) for name in names)
        return
    from finetune.verify.compute import compute_checks

    yield from compute_checks(folder, weights, device=options.device, dtype_name=options.dtype)

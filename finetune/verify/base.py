"""One card for a base checkpoint: is it whole, is it what it says, do we compute with it what transformers computes?

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
    """How the computing checks run, and which family the checkpoint should be."""

    family: str = ""
    layout: str = "auto"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compute: bool = True


def verify_base(folder: Path, options: Options = Options()) -> Iterator[Check]:
    """Every check in order, each as soon as it is known; heavy ones last."""
    if options.family:
        family(options.family)  # a name that is no family's is the caller's mistake, not the checkpoint's
    files_ok, config_ok, weights = True, True, None
    try:
        require_files(folder)
        yield Check(name="files", status="pass", detail="config, tokenizer and processor files are there")
    except ValueError as error:
        files_ok = False
        yield Check(name="files", status="fail", detail=str(error))
    try:
        found = read_family(folder)
        yield check_config(found, options.family)
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
            yield _guarded(check, folder, found)
    yield from _computing(folder, weights if files_ok else None, options)


def check_config(found: Family, wanted: str = "") -> Check:
    """The config.json against the family table: by name where one is given, else by the dimensions it shares."""
    names = [wanted] if wanted else [name for name in family_names() if _is_meant(family(name), found)]
    for name in names:
        unlike = _differences(hub_config(found), hub_config(family(name)))
        if not unlike:
            return Check(name="config", status="pass", detail=f"every value is {family(name).name}'s")
        return Check(name="config", status="fail", detail=f"unlike {family(name).name}: {'; '.join(unlike)}")
    sizes = f"{found.text.num_hidden_layers} layers of {found.text.hidden_size}"
    return Check(name="config", status="note", detail=f"consistent, but no published size has its dimensions ({sizes})")


def _is_meant(entry: Family, found: Family) -> bool:
    """Whether a config is held to this entry: a published size of the same dimensions, or a toy that it equals."""
    if entry.hub_id is None:
        return hub_config(entry) == hub_config(found)
    ours, theirs = entry.text, found.text
    return (ours.num_hidden_layers, ours.hidden_size, entry.is_moe) == (
        theirs.num_hidden_layers,
        theirs.hidden_size,
        found.is_moe,
    )


def _differences(found: dict[str, object], wanted: dict[str, object], at: str = "") -> list[str]:
    unlike = []
    for key in sorted(found.keys() | wanted.keys()):
        ours, theirs = found.get(key), wanted.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            unlike += _differences(ours, theirs, f"{at}{key}.")
        elif ours != theirs:
            unlike.append(f"{at}{key} is {ours}, not {theirs}")
    return unlike


def _weights_line(weights: BaseFiles) -> Check:
    size = sum(tensor.size for tensor in weights.stored.values())
    count = len({tensor.file for tensor in weights.stored.values()})
    kinds = ", ".join(sorted({tensor.dtype for tensor in weights.stored.values()}))
    detail = f"{len(weights.stored)} tensors, {size:,} bytes of {kinds} in {count} file(s), layout {weights.layout}"
    return Check(name="weights", status="pass", detail=detail)


def _guarded(check: Callable[[Path, Family], Check], folder: Path, found: Family) -> Check:
    """A user's broken file is a failed line, not the end of the card."""
    try:
        return check(folder, found)
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

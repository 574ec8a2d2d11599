"""Export an adapter in a form that servers read, with one rank, one scale and a page on how to serve it.

Servers read one rank and one alpha from the config and ignore PEFT's patterns by module. Therefore smaller ranks are
padded with zeros, and other scales are folded into B. The files are read back and compared before the folder is named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.card import card
from finetune.adapters.change import Change
from finetune.adapters.keys import CHANGES_KEY, FAMILIES_KEY, ORIENTATION_KEY
from finetune.adapters.provenance import base_of, versions
from finetune.adapters.source import AdapterSource, open_source
from finetune.adapters.write import (
    FORMS,
    OutAdapter,
    OutChange,
    OutForm,
    OutFull,
    card_lines,
    with_both_stacks,
    write_adapter_folder,
)
from finetune.architecture.shapes import Shape, is_expert_stack, part_of
from finetune.files.readers import tested_section
from finetune.files.tensorfile import torch_type


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished export; `exact` says whether its changes equal the adapter's to the last bit."""

    folder: Path
    changes: int
    bytes: int
    r: int
    scale: float
    exact: bool
    warnings: tuple[str, ...]


def export(adapter: Path, out: Path, *, form: OutForm, shapes: Mapping[str, Shape] | None = None) -> Exported:
    """Write the adapter in another form; the base's `shapes` settle what the adapter's own shapes leave ambiguous."""
    if form not in FORMS:
        raise ValueError(f"--format {form!r} is unknown; use {', '.join(FORMS)}")
    source = open_source(adapter, shapes)
    if source.full and form == "per-expert":
        raise ValueError(
            f"{adapter} stores tensors in full ({len(source.full)}, first {next(iter(source.full))}), which no reader "
            f"of 2-D keys takes. Merge it instead: moetune merge BASE {adapter} OUT"
        )
    r = max((change.r for change in source.changes.values()), default=1)
    scale = _common_scale(source)
    changes = with_both_stacks([_uniform(change, r, scale) for change in source.changes.values()])
    named = base_of(source.metadata)
    base = named.name if named is not None else str(source.config.get("base_model_name_or_path") or "unknown")
    metadata = {key: text for key, text in source.metadata.items() if key.startswith("moetune.")}
    metadata.pop(FAMILIES_KEY, None)  # ranks and scales have changed, so training cannot continue from an export
    metadata |= {
        ORIENTATION_KEY: f"form {form}, experts [out, in]",
        CHANGES_KEY: str(len(changes)),
        "moetune.versions": versions(),
    }
    exact = all(_ratio_is_exact(change.scale / scale) for change in source.changes.values())
    warnings = _warnings(source, exact)
    full = [
        OutFull(target=name, shape=tuple(tensor.shape), dtype=tensor.dtype, read=partial(source.read_full, name))
        for name, tensor in source.full.items()
    ]
    page = notes(form, base, r, warnings)
    text = card(base, metadata, card_lines(changes, full), title="Exported adapter", notes=page)
    written = OutAdapter(changes=changes, full=full, base=base, metadata=metadata, card=text, form=form)
    size = write_adapter_folder(written, out, check=lambda folder: compare(open_source(folder), changes))
    return Exported(
        folder=out,
        changes=len(changes),
        bytes=size,
        r=r,
        scale=scale,
        exact=exact,
        warnings=tuple(warnings),
    )


def compare(written: AdapterSource, changes: Sequence[OutChange]) -> None:
    """Raise unless a file gives exactly these changes."""
    for change in changes:
        reread = written.changes.get(change.target)
        if reread is None or not _alike(reread, change) or not _equal(reread.read(), change.read()):
            raise ValueError(
                f"{written.folder}: {change.target} reads back with other values than were written; nothing was kept"
            )


def compare_settings(written: AdapterSource, changes: Sequence[OutChange]) -> None:
    """Raise unless a file and its config give these changes the right shapes, ranks and scales."""
    for change in changes:
        reread = written.changes.get(change.target)
        if reread is None or not _alike(reread, change):
            raise ValueError(
                f"{written.folder}: {change.target} reads back with another rank or scale; nothing was kept"
            )


def _alike(reread: Change, change: OutChange) -> bool:
    same = (reread.shape, reread.r) == (change.shape, change.r)
    return same and math.isclose(reread.scale, change.scale, rel_tol=1e-12)


def _equal(reread: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(reread, factors, strict=True))


def _common_scale(source: AdapterSource) -> float:
    """The scale of the experts, which have most parameters; without experts, the most frequent scale."""
    changes = source.changes.values()
    scales = Counter(change.scale for change in changes if is_expert_stack(change.target))
    scales = scales or Counter(change.scale for change in changes)
    return scales.most_common(1)[0][0] if scales else 1.0


def _uniform(change: Change, r: int, scale: float) -> OutChange:
    """The same change with this rank and scale, in float32 if folding the scale into B would round."""
    ratio = change.scale / scale
    dtype = change.dtype if _ratio_is_exact(ratio) else "F32"
    return OutChange(
        target=change.target,
        shape=change.shape,
        r=r,
        scale=scale,
        dtype=dtype,
        read=_reader(change, r, ratio, dtype),
    )


def _reader(change: Change, r: int, ratio: float, dtype: str) -> Callable[[], tuple[Tensor, Tensor]]:
    def read() -> tuple[Tensor, Tensor]:
        a, b = (factor.to(torch_type(dtype)) for factor in change.read())
        if ratio != 1:
            b = b * ratio
        if change.r == r:
            return a, b
        wide_a, wide_b = a.new_zeros(a.shape[0], r, a.shape[2]), b.new_zeros(b.shape[0], b.shape[1], r)
        wide_a[:, : change.r], wide_b[:, :, : change.r] = a, b
        return wide_a, wide_b

    return read


def _ratio_is_exact(ratio: float) -> bool:
    """Return whether the ratio is a power of two, which changes exponents only."""
    return abs(math.frexp(ratio)[0]) == 0.5


def _warnings(source: AdapterSource, exact: bool) -> list[str]:
    warnings = []
    parts = {part_of(name) for name in source.changes}
    if source.full:
        warnings.append(
            f"it stores tensors in full (modules_to_save, {len(source.full)}): PEFT reads them, vLLM refuses them"
        )
    if source.copies:
        warnings.append(f"its copy of the base's {', '.join(source.copies)} was left out: readers use the base's own")
    if "router" in parts:
        warnings.append("it adapts routers, which PEFT supports and servers do not; merge it to serve it")
    if parts & {"vision_blocks", "merger", "deepstack_mergers"}:
        warnings.append("it adapts the vision side, which few servers support; compare the answers, or merge it")
    if not exact:
        warnings.append(
            "its parts have several scales: B was multiplied to a common one, rounded to float32 (6e-8 of each value)"
        )
    return warnings


_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank accepts

_PEFT = """\
## What reads it

Experts are packed in PEFT's fused form (PEFT 0.19.1 and newer on transformers 5).

- **vLLM**, whose Qwen3-VL-MoE recognises this form:

```bash
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine=THIS_FOLDER
```

- **PEFT**: `PeftModel.from_pretrained(model, THIS_FOLDER)`.
"""
_SINGLE = """\
## What reads it

Every expert has its own keys (`experts.N.gate_proj`, `up_proj`, `down_proj`), each a plain 2-D pair.

- **sglang**:

```bash
python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths mine=THIS_FOLDER --max-lora-rank {r}
```

- **vLLM** takes this form only with `enable_mixed_moe_lora_format`, and `is_3d_lora_weight` false for this adapter.
  A wrong setting loads garbage without an error. Prefer an export with `--format peft`.
- Trainers and converters that name experts one by one. PEFT on transformers 5 does not: its experts are fused.
"""
_END = """\
A server that does not know an adapter's keys may drop them without an error. Therefore compare its answers with those
of the merged model: `moetune serve-check` does that. The safest form to serve is a merged folder.
"""


def notes(form: str, base: str, r: int, warnings: Sequence[str]) -> str:
    """Return the last part of the page: which programs read the export, the warnings, and the tested releases."""
    rank = next((size for size in _RANKS if size >= r), r)
    text = (_PEFT if form == "peft" else _SINGLE).format(base=base, rank=rank, r=r)
    items = "".join(f"- {line}.\n" for line in warnings)
    note = f"## Note\n\n{items}\n" if items else ""
    return f"{text}\n{note}{tested_section(form)}\n{_END}"

"""Sum adapters with weights, experts included: exactly, by concatenating factors, or at a smaller rank, by SVD."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.card import card
from finetune.adapters.change import Change
from finetune.adapters.contents import families_text
from finetune.adapters.export import compare_settings
from finetune.adapters.keys import FAMILIES_KEY, MODEL_TYPE_KEY, ORIENTATION, ORIENTATION_KEY
from finetune.adapters.provenance import BASE, CONFIGURATION, PARENT, base_of, parent_line, seen_settings, versions
from finetune.adapters.source import AdapterSource, open_source
from finetune.adapters.write import (
    OutAdapter,
    OutChange,
    OutFull,
    card_lines,
    with_both_stacks,
    write_adapter_folder,
)
from finetune.architecture.shapes import Shape, part_of
from moe.experts import ExpertLora as Lora


@dataclass(frozen=True, kw_only=True)
class Term:
    """An adapter and its weight in the sum."""

    source: AdapterSource
    weight: float


@dataclass(kw_only=True)
class Combined:
    """The result of a sum. `errors` is the relative error of each tensor whose rank was reduced."""

    folder: Path
    bytes: int = 0
    exact: bool = True
    alike: bool = True
    """Whether all adapters have the same settings for images, videos and conversations; if so, the sum keeps them."""
    ranks: dict[str, int] = field(default_factory=dict)
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def errors(self) -> dict[str, float]:
        """Relative error of each tensor's change, by tensor name."""
        return {name: math.sqrt(lost / total) if total else 0.0 for name, (lost, total) in self.squares.items()}

    @property
    def error(self) -> float:
        """Relative error over all tensors."""
        lost, total = (sum(pair[at] for pair in self.squares.values()) for at in (0, 1))
        return math.sqrt(lost / total) if total else 0.0


def combine(weights: Mapping[Path, float], out: Path, *, rank: int = 0) -> Combined:
    """Write the weighted sum of adapters. `rank` limits the rank of each change; 0 keeps the sum exact."""
    terms = [Term(source=open_source(folder), weight=weight) for folder, weight in weights.items()]
    if len(terms) < 2:
        raise ValueError("a sum needs at least two adapters, such as OUT A=0.7 B=0.3")
    for term in terms:
        if not math.isfinite(term.weight) or not term.weight:
            raise ValueError(
                f"{term.source.folder}: its weight is {term.weight}; it must be a finite number other than 0"
            )
    base, base_metadata = _same_base(terms)
    settings = [seen_settings(term.source.metadata) for term in terms]
    combined = Combined(folder=out, alike=settings.count(settings[0]) == len(terms))
    changes = [_sum(name, terms, rank, combined) for name in _names(terms)]
    full = _full(terms)
    metadata = {
        ORIENTATION_KEY: ORIENTATION,
        PARENT: _parents(terms),
        "moetune.versions": versions(),
        **({BASE: base_metadata} if base_metadata else {}),
        **({CONFIGURATION: json.dumps(settings[0], sort_keys=True)} if combined.alike and settings[0] else {}),
        **_families(changes, full, terms),
    }
    changes = with_both_stacks(changes)
    text = card(base, metadata, card_lines(changes, full), title="Sum of adapters")
    written = OutAdapter(changes=changes, full=full, base=base, metadata=metadata, card=text, form="peft")
    combined.bytes = write_adapter_folder(
        written, out, check=lambda folder: compare_settings(open_source(folder), changes)
    )
    combined.ranks = {change.target: change.r for change in changes}
    return combined


def _same_base(terms: Sequence[Term]) -> tuple[str, str]:
    """Return the base's name and metadata; raise if two adapters name different bases."""
    known = [(term.source, base) for term in terms if (base := base_of(term.source.metadata)) is not None]
    if not known:
        return str(terms[0].source.config.get("base_model_name_or_path") or "unknown"), ""
    first_source, first_base = known[0]
    for source, base in known[1:]:
        if base.fingerprint != first_base.fingerprint:
            raise ValueError(
                f"{first_source.folder} was trained on {first_base.name} (fingerprint {first_base.fingerprint}), "
                f"{source.folder} on {base.name} (fingerprint {base.fingerprint}): their sum fits neither base"
            )
    return first_base.name, first_source.metadata[BASE]


def _names(terms: Sequence[Term]) -> list[str]:
    """The base tensors with a low-rank change in at least one adapter."""
    shapes: dict[str, tuple[Shape, Path]] = {}
    for term in terms:
        for name, change in term.source.changes.items():
            shape, folder = shapes.setdefault(name, (change.shape, term.source.folder))
            if shape != change.shape:
                raise ValueError(
                    f"{name} is {list(shape)} in {folder} and {list(change.shape)} in {term.source.folder}: the "
                    f"adapters belong to different bases"
                )
    return list(shapes)


def _sum(name: str, terms: Sequence[Term], rank: int, combined: Combined) -> OutChange:
    weighted = [(term.source.changes[name], term.weight) for term in terms if name in term.source.changes]
    exact_r = sum(change.r for change, _ in weighted)
    shape = weighted[0][0].shape
    r = min(rank or exact_r, exact_r, *shape[-2:])
    if r < exact_r:
        combined.exact = False

    def read() -> tuple[Tensor, Tensor]:
        a_Eri, b_Eor = side_by_side(weighted)
        if r == exact_r:
            return a_Eri, b_Eor
        a_Eri, b_Eor, lost, total = reduced(a_Eri, b_Eor, r)
        combined.squares[name] = (lost, total)
        return a_Eri, b_Eor

    return OutChange(target=name, shape=shape, r=r, scale=1.0, dtype="F32", read=read)


def side_by_side(weighted: Sequence[tuple[Change, float]]) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is the weighted sum: factors concatenated, with scales and weights folded into B."""
    pairs = [(change.read(), change.scale * weight) for change, weight in weighted]
    a_Eri = torch.cat([a.float() for (a, _), _ in pairs], dim=1)
    return a_Eri, torch.cat([b.float() * factor for (_, b), factor in pairs], dim=2)


def reduced(a_Eri: Tensor, b_Eor: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best factors of rank r, the squared norm of their error, and that of the full product.

    B A itself is never formed: its singular values are those of a small matrix, whose size is the factors' rank.
    """
    left, left_r = torch.linalg.qr(b_Eor.double())
    right, right_r = torch.linalg.qr(a_Eri.double().transpose(1, 2))
    u, s, vh = torch.linalg.svd(left_r @ right_r.transpose(1, 2))
    root = s[:, :r].sqrt()
    b = left @ (u[:, :, :r] * root[:, None, :])
    a = (root[:, :, None] * vh[:, :r]) @ right.transpose(1, 2)
    return a.float(), b.float(), float((s[:, r:] ** 2).sum()), float((s**2).sum())


def _full(terms: Sequence[Term]) -> list[OutFull]:
    """The sums of full tensors, which need no base only if every adapter has the tensor and the weights add up to 1."""
    names = {name for term in terms for name in term.source.full}
    total = sum(term.weight for term in terms)
    sums = []
    for name in sorted(names):
        lacking = [str(term.source.folder) for term in terms if name not in term.source.full]
        if lacking or not math.isclose(total, 1.0, rel_tol=1e-9):
            why = f"{', '.join(lacking)} does not have it" if lacking else f"the weights add up to {total:g}, not 1"
            raise ValueError(
                f"{name} is stored in full, and {why}: such a sum needs the base's own values. Merge one adapter into "
                f"the base first, or leave that part out"
            )
        stored = [term.source.full[name] for term in terms]
        if len({tensor.shape for tensor in stored}) > 1:
            raise ValueError(f"{name} has different shapes in these adapters: they belong to different bases")
        sums.append(OutFull(target=name, shape=stored[0].shape, dtype="F32", read=partial(_mean, name, terms)))
    return sums


def _mean(name: str, terms: Sequence[Term]) -> Tensor:
    total = sum(term.source.read_full(name).float() * term.weight for term in terms)
    assert isinstance(total, Tensor)
    return total


def _parents(terms: Sequence[Term]) -> str:
    lines = [json.loads(parent_line(term.source.folder)) | {"weight": term.weight} for term in terms]
    return json.dumps(lines, sort_keys=True)


def _families(changes: Sequence[OutChange], full: Sequence[OutFull], terms: Sequence[Term]) -> dict[str, str]:
    """The metadata that training needs to continue from the sum; empty if the ranks within a part differ."""
    ranks: dict[str, set[int]] = {}
    for change in changes:
        ranks.setdefault(part_of(change.target), set()).add(change.r)
    types = {term.source.metadata.get(MODEL_TYPE_KEY) for term in terms}
    if any(len(of_part) > 1 for of_part in ranks.values()) or len(types) > 1 or None in types:
        return {}
    families: dict[str, Lora | None] = {
        part: Lora(r=min(of_part), alpha=float(min(of_part))) for part, of_part in ranks.items()
    }
    families |= {part_of(tensor.target): None for tensor in full}
    return {FAMILIES_KEY: families_text(families), MODEL_TYPE_KEY: terms[0].source.metadata[MODEL_TYPE_KEY]}

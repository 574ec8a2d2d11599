"""A weighted sum of adapters, experts included: exact by laying factors side by side, or of a smaller rank by SVD."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.card import FamilyLine, card
from finetune.adapters.change import Change
from finetune.adapters.export import compare_settings
from finetune.adapters.forms import ORIENTATION
from finetune.adapters.provenance import BASE, PARENT, base_of, parent_line, versions
from finetune.adapters.source import AdapterSource, open_source
from finetune.adapters.write import OutAdapter, OutChange, OutFull, with_both_stacks, write_adapter_folder
from finetune.architecture.shapes import Shape, part_of
from finetune.files.tensorfile import FLOAT_TYPES
from moe.experts import ExpertLora as Lora


@dataclass(frozen=True, kw_only=True)
class Part:
    """An adapter and the weight it has in the sum."""

    source: AdapterSource
    weight: float


@dataclass(kw_only=True)
class Combined:
    """What was written. `errors`: how far a re-ranked change is from the sum, relative to it, by tensor."""

    folder: Path
    bytes: int = 0
    exact: bool = True
    ranks: dict[str, int] = field(default_factory=dict)
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def errors(self) -> dict[str, float]:
        """Relative error of each tensor's change."""
        return {name: math.sqrt(lost / total) if total else 0.0 for name, (lost, total) in self.squares.items()}

    @property
    def error(self) -> float:
        """Relative error over all."""
        lost, total = (sum(pair[at] for pair in self.squares.values()) for at in (0, 1))
        return math.sqrt(lost / total) if total else 0.0


def combine(weights: Mapping[Path, float], out: Path, *, rank: int = 0) -> Combined:
    """Write the sum of weight times adapter; `rank` is the most that a change may have, 0 for as much as it takes."""
    parts = [Part(source=open_source(folder), weight=weight) for folder, weight in weights.items()]
    if len(parts) < 2:
        raise ValueError("a sum needs two adapters or more: OUT A=0.7 B=0.3")
    for part in parts:
        if not math.isfinite(part.weight) or not part.weight:
            raise ValueError(
                f"{part.source.folder}: its weight is {part.weight}; a finite number other than 0 is wanted"
            )
    base, told = _same_base(parts)
    found = Combined(folder=out)
    changes = [_sum(name, parts, rank, found) for name in _names(parts)]
    full = _full(parts)
    metadata = {
        ORIENTATION: "experts [out, in], lora_A expert by expert, lora_B rank by rank",
        PARENT: _parents(parts),
        "moetune.versions": versions(),
        **({BASE: told} if told else {}),
        **_families(changes, full, parts),
    }
    changes = with_both_stacks(changes)
    text = card(base, metadata, _lines(changes, full), title="Sum of adapters")
    written = OutAdapter(changes=changes, full=full, base=base, metadata=metadata, card=text, form="peft")
    found.bytes = write_adapter_folder(
        written, out, check=lambda folder: compare_settings(open_source(folder), changes)
    )
    found.ranks = {change.target: change.r for change in changes}
    return found


def _same_base(parts: Sequence[Part]) -> tuple[str, str]:
    """The base's name and its metadata; raises where two adapters say that they are of different ones."""
    known = [(part, base) for part in parts if (base := base_of(part.source.metadata)) is not None]
    for part, base in known[1:]:
        first, ours = known[0]
        if base.fingerprint != ours.fingerprint:
            raise ValueError(
                f"{first.source.folder} was trained on {ours.name} (fingerprint {ours.fingerprint}), "
                f"{part.source.folder} on {base.name} (fingerprint {base.fingerprint}): their sum fits neither base"
            )
    if known:
        return known[0][1].name, known[0][0].source.metadata[BASE]
    return str(parts[0].source.config.get("base_model_name_or_path") or "unknown"), ""


def _names(parts: Sequence[Part]) -> list[str]:
    shapes: dict[str, tuple[Shape, Path]] = {}
    for part in parts:
        for name, change in part.source.changes.items():
            shape, folder = shapes.setdefault(name, (change.shape, part.source.folder))
            if shape != change.shape:
                raise ValueError(
                    f"{name} is {list(shape)} in {folder} and {list(change.shape)} in {part.source.folder}: the "
                    f"adapters are of different bases"
                )
    return list(shapes)


def _sum(name: str, parts: Sequence[Part], rank: int, found: Combined) -> OutChange:
    terms = [(part.source.changes[name], part.weight) for part in parts if name in part.source.changes]
    whole = sum(change.r for change, _ in terms)
    shape = terms[0][0].shape
    r = min(rank or whole, whole, *shape[-2:])
    if r < whole:
        found.exact = False

    def read() -> tuple[Tensor, Tensor]:
        a_Eri, b_Eor = side_by_side(terms)
        if r == whole:
            return a_Eri, b_Eor
        a_Eri, b_Eor, lost, total = reduced(a_Eri, b_Eor, r)
        found.squares[name] = (lost, total)
        return a_Eri, b_Eor

    return OutChange(target=name, shape=shape, r=r, scale=1.0, dtype="F32", read=read)


def side_by_side(terms: Sequence[tuple[Change, float]]) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is the weighted sum: factors one after the other, scales and weights in B."""
    pairs = [(change.read(), change.scale * weight) for change, weight in terms]
    a_Eri = torch.cat([a.float() for (a, _), _ in pairs], dim=1)
    return a_Eri, torch.cat([b.float() * factor for (_, b), factor in pairs], dim=2)


def reduced(a_Eri: Tensor, b_Eor: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best factors of rank r, and the squares of what they lose and of the whole.

    The singular values of B A are those of a matrix of the factors' rank, so that B A itself is never made.
    """
    left, left_r = torch.linalg.qr(b_Eor.double())
    right, right_r = torch.linalg.qr(a_Eri.double().transpose(1, 2))
    u, s, vh = torch.linalg.svd(left_r @ right_r.transpose(1, 2))
    root = s[:, :r].sqrt()
    b = left @ (u[:, :, :r] * root[:, None, :])
    a = (root[:, :, None] * vh[:, :r]) @ right.transpose(1, 2)
    return a.float(), b.float(), float((s[:, r:] ** 2).sum()), float((s**2).sum())


def _full(parts: Sequence[Part]) -> list[OutFull]:
    """Tensors in full: without the base, their sum is known only where all hold them and the weights make one."""
    names = {name for part in parts for name in part.source.full}
    total = sum(part.weight for part in parts)
    found = []
    for name in sorted(names):
        lacking = [str(part.source.folder) for part in parts if name not in part.source.full]
        if lacking or not math.isclose(total, 1.0, rel_tol=1e-9):
            why = f"{', '.join(lacking)} does not hold it" if lacking else f"the weights make {total:g}, not 1"
            raise ValueError(
                f"{name} is held in full, and {why}: such a sum needs the base's own values. Merge one adapter into "
                f"the base first, or leave that family out"
            )
        stored = [part.source.full[name] for part in parts]
        if len({tensor.shape for tensor in stored}) > 1:
            raise ValueError(f"{name} has different shapes in these adapters: they are of different bases")
        first = stored[0]
        found.append(OutFull(target=name, shape=first.shape, dtype=first.dtype, read=partial(_mean, name, parts)))
    return found


def _mean(name: str, parts: Sequence[Part]) -> Tensor:
    total = sum(part.source.read_full(name).float() * part.weight for part in parts)
    assert isinstance(total, Tensor)
    return total.to(getattr(torch, FLOAT_TYPES[parts[0].source.full[name].dtype]))


def _parents(parts: Sequence[Part]) -> str:
    lines = [json.loads(parent_line(part.source.folder)) | {"weight": part.weight} for part in parts]
    return json.dumps(lines, sort_keys=True)


def _families(changes: Sequence[OutChange], full: Sequence[OutFull], parts: Sequence[Part]) -> dict[str, str]:
    """What training needs to go on from here, where every family has one rank."""
    ranks: dict[str, set[int]] = {}
    for change in changes:
        ranks.setdefault(part_of(change.target), set()).add(change.r)
    kind = "moetune.model_type"
    types = {part.source.metadata.get(kind) for part in parts}
    if any(len(found) > 1 for found in ranks.values()) or len(types) > 1 or None in types:
        return {}
    families = {part: asdict(Lora(r=min(found), alpha=float(min(found)))) for part, found in ranks.items()}
    families |= {part_of(tensor.target): {} for tensor in full}
    return {"moetune.families": json.dumps(families), kind: parts[0].source.metadata[kind]}


def _lines(changes: Sequence[OutChange], full: Sequence[OutFull]) -> list[FamilyLine]:
    groups: dict[tuple[str, str], list[int]] = {}
    for change in changes:
        key = (part_of(change.target), f"lora of r {change.r}, scale 1")
        groups.setdefault(key, []).append(change.experts * change.r * sum(change.shape[-2:]))
    for tensor in full:
        groups.setdefault((part_of(tensor.target), "full"), []).append(math.prod(tensor.shape))
    return [
        FamilyLine(part=part, how=how, tensors=len(sizes) * (1 if how == "full" else 2), parameters=sum(sizes))
        for (part, how), sizes in groups.items()
    ]

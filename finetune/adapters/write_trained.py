"""Write the trained tensors of a model as a PEFT adapter, from ranks that each hold a part of them.

LoRA factors of dense matrices, experts and routers have PEFT's names; tensors trained in full are `modules_to_save` in
PEFT's terms. PEFT has one dropout and one rsLoRA switch per adapter and refuses both on experts. Therefore the config
sets neither and gives the final scale; the file's metadata records the values used in training.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.card import PartLine, card
from finetune.adapters.contents import (
    TrainedTensor,
    families_text,
    file_config,
    lora_by_part,
    mode_text,
    trained_tensors,
)
from finetune.adapters.keys import CARD, CONFIG, FAMILIES_KEY, MODEL_TYPE_KEY, ORIENTATION, ORIENTATION_KEY, WEIGHTS
from finetune.adapters.provenance import Provenance, versions
from finetune.adapters.reopen import Expected, reopened
from finetune.adapters.write import config_bytes
from finetune.files.atomic import whole_folder, write_file
from finetune.files.tensorfile import reserve, type_name
from finetune.model.empty import EmptyModel
from finetune.model.lora import adapted_part
from finetune.ranks.collectives import at_rank_zero, raise_together, rank_and_world
from finetune.ranks.engine import gathered
from moe.experts import GroupedExperts
from moe.packing import pack_lora

Piece = tuple[TrainedTensor, int, Tensor]
"""(tensor, its first row or expert in the piece, the rows)"""


def write_adapter(
    empty: EmptyModel,
    folder: Path,
    *,
    base: str,
    provenance: Provenance | None = None,
    extra: Mapping[str, str] | None = None,
    trained: bool = True,
    replace: bool = False,
) -> list[str]:
    """Write all trainable tensors to an adapter folder. Rank 0 writes the files; every rank must call this.

    Each rank gathers one tensor at a time; experts reach rank 0 under their global ids. The folder gets its name only
    when no expert is missing and its file was reopened and checked. `base` is the model for PEFT to load; `extra` is
    added to the metadata; `replace` allows overwriting an earlier adapter. If `trained`, rank 0 returns warnings about
    factors that are still zero.
    """
    tensors = list(trained_tensors(empty))
    pieces = gathered_pieces(tensors)
    error: Exception | None = None
    warnings: list[str] = []
    if rank_and_world()[0] == 0:
        try:
            warnings = write_pieces(
                empty,
                folder,
                tensors,
                pieces,
                base=base,
                provenance=provenance,
                extra=extra,
                trained=trained,
                replace=replace,
            )
        except (OSError, ValueError) as failure:
            error = failure
    for _ in pieces:  # the part of the other ranks, and of rank 0 after an error, so that no rank waits for it
        pass
    raise_together(f"writing {folder}", error)
    return warnings


def gathered_pieces(tensors: Iterable[TrainedTensor]) -> Iterator[Piece]:
    """Yield, on rank 0, each complete tensor or its rows from one rank after another; every rank must exhaust this."""
    for tensor in tensors:
        with gathered(tensor.parameter):
            for first, rows in at_rank_zero(tensor.parameter, tensor.owner):
                yield tensor, first, rows


def write_pieces(
    empty: EmptyModel,
    folder: Path,
    tensors: Sequence[TrainedTensor],
    pieces: Iterable[Piece],
    *,
    base: str,
    provenance: Provenance | None = None,
    extra: Mapping[str, str] | None = None,
    trained: bool = True,
    replace: bool = False,
) -> list[str]:
    """Write the folder from pieces of any origin, on this rank alone."""
    metadata = _metadata(empty) | (provenance.metadata() if provenance is not None else {})
    metadata |= {f"moetune.{key}": text for key, text in (extra or {}).items()}
    expected = {tensor.file_name: _expected(tensor) for tensor in tensors}
    with whole_folder(folder, replace=replace) as beside:
        _write_tensors(beside / WEIGHTS, tensors, pieces, expected, metadata)
        warnings = reopened(beside / WEIGHTS, expected, trained=trained)
        write_file(beside / CONFIG, config_bytes(file_config(empty, base)))
        write_file(beside / CARD, card(base, metadata, _card_lines(empty, tensors)))
    return warnings


def _expected(tensor: TrainedTensor) -> Expected:
    return Expected(
        dtype=type_name(tensor.parameter.dtype),
        shape=tensor.shape,
        experts=tensor.experts if tensor.is_packed else 1,
    )


def _write_tensors(
    file: Path,
    tensors: Sequence[TrainedTensor],
    pieces: Iterable[Piece],
    expected: Mapping[str, Expected],
    metadata: Mapping[str, str],
) -> None:
    """Write the file of tensors; raise unless every row of each tensor arrived."""
    missing = {tensor.name: set(range(tensor.experts)) for tensor in tensors}
    kinds = {name: (entry.dtype, entry.shape) for name, entry in expected.items()}
    with reserve(file, kinds, metadata) as reserved:
        for tensor, begin, rows in _packed(pieces, missing):
            reserved.put(tensor.file_name, rows, begin)
        incomplete = {name: sorted(rows) for name, rows in missing.items() if rows}
        if incomplete:
            name, absent = next(iter(incomplete.items()))
            raise ValueError(
                f"{len(incomplete)} of {len(tensors)} tensors reached rank 0 incomplete, first {name} without "
                f"experts or rows {absent[:8]}; nothing was written to {file.parent}"
            )


def _packed(pieces: Iterable[Piece], missing: Mapping[str, set[int]]) -> Iterator[tuple[TrainedTensor, int, Tensor]]:
    """Yield tensors as the file stores them, with their first byte there; a factor A of experts waits for its B.

    Rows that arrived are removed from `missing`.
    """
    parts: dict[str, list[Tensor]] = {}
    waiting: dict[str, TrainedTensor] = {}
    for tensor, first, rows in pieces:
        if not isinstance(tensor.owner, GroupedExperts):
            missing[tensor.name].clear()
            yield tensor, 0, rows
            continue
        missing[tensor.name].difference_update(range(first, first + len(rows)))
        if not tensor.is_packed:
            yield tensor, first * rows[0].numel() * rows.element_size(), rows
            continue
        parts.setdefault(tensor.name, []).append(rows.clone())
        if missing[tensor.name]:
            continue
        waiting[tensor.name] = tensor
        if tensor.name.endswith(".lora_B.weight"):
            pair = [waiting.pop(tensor.name.replace(".lora_B.", f".lora_{factor}.")) for factor in "AB"]
            packed = pack_lora(*(torch.cat(parts.pop(factor.name)) for factor in pair))
            yield from ((factor, 0, values) for factor, values in zip(pair, packed, strict=True))


def _metadata(empty: EmptyModel) -> dict[str, str]:
    """Return a training's configuration and versions; nothing about ranks, so that all layouts write one file."""
    return {
        "format": "pt",
        FAMILIES_KEY: families_text(lora_by_part(empty)),
        MODEL_TYPE_KEY: empty.model_type,
        ORIENTATION_KEY: ORIENTATION,
        "moetune.seed": str(empty.seed),
        "moetune.versions": versions(),
    }


def _card_lines(empty: EmptyModel, tensors: Iterable[TrainedTensor]) -> list[PartLine]:
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        sizes.setdefault(adapted_part(tensor.name), []).append(math.prod(tensor.shape))
    return [
        PartLine(part=part, how=mode_text(lora, True), tensors=len(sizes[part]), parameters=sum(sizes[part]))
        for part, lora in lora_by_part(empty).items()
    ]

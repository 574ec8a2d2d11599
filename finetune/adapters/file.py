"""PEFT's own adapter file, of a model that is spread over ranks: `adapter_model.safetensors`, `adapter_config.json`.

LoRA of dense matrices, of experts and of routers lies under PEFT's names; what was trained in full is in PEFT's words
`modules_to_save`. PEFT has one dropout and one rsLoRA switch for a whole adapter and refuses both on experts, so its
config says neither and gives the scale itself; what training used is in the metadata of the tensors' file.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from finetune.adapters.card import FamilyLine, card
from finetune.adapters.contents import Held, file_config, held_tensors, trained_families
from finetune.adapters.forms import ORIENTATION
from finetune.adapters.provenance import Provenance, versions
from finetune.adapters.reopen import Expected, reopened
from finetune.architecture.parts import FAMILIES
from finetune.architecture.shapes import Shape
from finetune.files.atomic import whole_folder, write_file
from finetune.files.tensorfile import ITEM_SIZES, Stored, make_header, read_header, read_rows
from finetune.model.empty import EmptyModel
from finetune.model.lora import adapted_part
from finetune.ranks.collectives import at_rank_zero, raise_together, rank_and_world
from finetune.ranks.engine import gathered
from moe.experts import ExpertLora as Lora
from moe.experts import GroupedExperts
from moe.names import PEFT_PREFIX
from moe.packing import pack_lora, unpack_lora

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_FAMILIES, _TYPE = "moetune.families", "moetune.model_type"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An adapter of ours on disk, to begin training with. Canonical names; `shapes` has the tensors kept in full."""

    folder: Path
    stored: Mapping[str, Stored]
    families: Mapping[str, Lora | None]
    model_type: str
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the base's tensors that the adapter replaces."""
        return {name: stored.shape for name, stored in self.stored.items() if ".lora_" not in name}

    @property
    def factors(self) -> set[str]:
        """Names of the low-rank factors."""
        return {name for name in self.stored if ".lora_" in name}

    def size(self, name: str, rows: range | None = None) -> int:
        """Bytes that reading rows of a tensor, or all of it, takes from the disk."""
        return self.stored[name].row_size * (self.stored[name].shape[0] if rows is None else len(rows))

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return rows of a tensor as it is stored, or all of it."""
        stored = self.stored[name]
        handle = os.open(stored.file, os.O_RDONLY)
        try:
            return read_rows(handle, stored, range(stored.shape[0]) if rows is None else rows)
        finally:
            os.close(handle)

    def factor(self, name: str, owner: nn.Module) -> Tensor:
        """Return a factor as its owner holds it: of experts [L, r, in] or [L, out, r], those of this rank."""
        if not isinstance(owner, GroupedExperts):
            return self.read(name)
        experts = owner.local_experts
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        a, b = (self.read(f"{stem}.{kind}.weight") for kind in ("lora_A", "lora_B"))
        pair = unpack_lora(stem, a, b, experts=owner.num_experts)
        return pair[kind == "lora_B"][experts.start : experts.stop]

    def check_fits(self, empty: EmptyModel) -> None:
        """Raise unless each tensor has its place in the model, adapted with the same rank and scale."""
        key = {part: f"adapters.{family}" for family, part in FAMILIES.items()}
        if self.model_type != empty.model_type:
            raise ValueError(f"{self.folder} adapts a {self.model_type}, this base is a {empty.model_type}")
        ours = trained_families(empty)
        for part, theirs in self.families.items():
            if _words(ours.get(part), part in ours) != _words(theirs, True):
                raise ValueError(
                    f"{self.folder} holds {part} as {_words(theirs, True)}; {key[part]} says "
                    f"{_words(ours.get(part), part in ours)}. Set {key[part]} to what the adapter has"
                )
        shapes = {held.name: held.shape for held in held_tensors(empty) if adapted_part(held.name) in self.families}
        for name in {**shapes, **self.stored}:
            found = self.stored[name].shape if name in self.stored else None
            if found != shapes.get(name):
                raise ValueError(
                    f"{self.folder}: {name} is {_shown(found)} in the adapter, {_shown(shapes.get(name))} in this model"
                    f": it was trained on another base, or the file is not whole"
                )


def _words(lora: Lora | None, trains: bool) -> str:
    if lora is None:
        return "full" if trains else "frozen"
    return f"lora of r {lora.r}, scale {lora.scale:g}"


def _shown(shape: Shape | None) -> str:
    return "absent" if shape is None else str(list(shape))


def is_ours(folder: Path) -> bool:
    """Say whether a folder holds an adapter that was written here; another tool's says less of itself."""
    return (folder / WEIGHTS).is_file() and _FAMILIES in read_header(folder / WEIGHTS)[1]


def open_adapter(folder: Path) -> AdapterFile:
    """Return the adapter that `write_adapter` wrote into a folder; its tensors are read when asked for."""
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no adapter: {name} is missing")
    tensors, metadata = read_header(folder / WEIGHTS)
    if _FAMILIES not in metadata:
        raise ValueError(
            f"{folder} holds an adapter of another tool: its metadata lacks {_FAMILIES}, which says how each family "
            f"was trained. Only adapters written here can be continued"
        )
    families = {part: Lora(**values) if values else None for part, values in json.loads(metadata[_FAMILIES]).items()}
    stored = {name if ".lora_" in name else name.removeprefix(PEFT_PREFIX): entry for name, entry in tensors.items()}
    return AdapterFile(
        folder=folder, stored=stored, families=families, model_type=metadata[_TYPE], metadata=metadata
    )  # fmt: skip


def write_adapter(
    empty: EmptyModel,
    folder: Path,
    *,
    base: str,
    provenance: Provenance | None = None,
    extra: Mapping[str, str] | None = None,
    trained: bool = True,
) -> list[str]:
    """Write what the model trains as an adapter folder, of rank 0's making; every rank must call this.

    One tensor is whole on the ranks at a time; experts come to rank 0 under their global ids, and the folder is not
    finished while one is missing, or before its file was opened again and checked. `base` is what PEFT shall load it
    onto; `extra` goes into the metadata. Returns warnings, at rank 0: factors that `trained`, yet are zero.
    """
    held = list(held_tensors(empty))
    pieces = _pieces(held)
    error: Exception | None = None
    warnings: list[str] = []
    if rank_and_world()[0] == 0:
        try:
            warnings = write_pieces(
                empty, folder, held, pieces, base=base, provenance=provenance, extra=extra, trained=trained
            )
        except (OSError, ValueError) as found:
            error = found
    for _ in pieces:  # the other ranks' part; and rank 0's after an error, so that nobody waits for it
        pass
    raise_together(f"writing {folder}", error)
    return warnings


def write_pieces(
    empty: EmptyModel,
    folder: Path,
    held: list[Held],
    pieces: Iterable[tuple[Held, int, Tensor]],
    *,
    base: str,
    provenance: Provenance | None = None,
    extra: Mapping[str, str] | None = None,
    trained: bool = True,
) -> list[str]:
    """Write the folder from (tensor, its first row, rows), wherever they come from; no other rank has a part in it."""
    texts = _metadata(empty) | (provenance.metadata() if provenance is not None else {})
    texts |= {f"moetune.{key}": value for key, value in (extra or {}).items()}
    small = {CONFIG: _config_text(file_config(empty, base)), CARD: card(base, texts, _card_lines(empty, held))}
    return _write_folder(folder, held, pieces, texts, small, trained=trained)


def _pieces(held: Iterable[Held]) -> Iterator[tuple[Held, int, Tensor]]:
    """Each tensor whole, or its rows from rank after rank, at rank 0; every rank must exhaust this."""
    for tensor in held:
        with gathered(tensor.parameter):
            for first, rows in at_rank_zero(tensor.parameter, tensor.owner):
                yield tensor, first, rows


def _write_folder(
    folder: Path,
    held: list[Held],
    pieces: Iterable[tuple[Held, int, Tensor]],
    metadata: Mapping[str, str],
    small: Mapping[str, bytes],
    *,
    trained: bool,
) -> list[str]:
    """The file has its full size before the first tensor comes: a disk too small is known at once."""
    expected = {
        tensor.file_name: Expected(
            dtype=_DTYPES[tensor.parameter.dtype], shape=tensor.shape, experts=tensor.experts if tensor.is_packed else 1
        )
        for tensor in held
    }
    header, offsets = make_header({name: (want.dtype, want.shape) for name, want in expected.items()}, metadata)
    total = len(header) + sum(math.prod(want.shape) * ITEM_SIZES[want.dtype] for want in expected.values())
    left = {tensor.name: set(range(tensor.experts)) for tensor in held}
    with whole_folder(folder) as beside, (beside / WEIGHTS).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, total)
        file.write(header)
        file.flush()
        for tensor, begin, rows in _packed(pieces, left):
            _put(file.fileno(), offsets[tensor.file_name] + begin, rows)
        missing = {name: sorted(units) for name, units in left.items() if units}
        if missing:
            name, units = next(iter(missing.items()))
            raise ValueError(
                f"{len(missing)} of {len(held)} tensors came to rank 0 only in part, first {name} without experts or "
                f"rows {units[:8]}; nothing was written to {folder}"
            )
        os.fsync(file.fileno())
        warnings = reopened(beside / WEIGHTS, expected, trained=trained)
        for name, content in small.items():
            write_file(beside / name, content)
    return warnings


def _put(handle: int, begin: int, tensor: Tensor) -> None:
    view, done = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, 0
    while done < len(view):  # one call writes 2 GiB at most
        done += os.pwrite(handle, view[done:], begin + done)


def _packed(
    pieces: Iterable[tuple[Held, int, Tensor]], left: Mapping[str, set[int]]
) -> Iterator[tuple[Held, int, Tensor]]:
    """Tensors as the file has them, with their first byte; of experts' factors, A waits for its B."""
    parts: dict[str, list[Tensor]] = {}
    waiting: dict[str, Held] = {}
    for tensor, first, rows in pieces:
        if not isinstance(tensor.owner, GroupedExperts):
            left[tensor.name].clear()
            yield tensor, 0, rows
            continue
        left[tensor.name].difference_update(range(first, first + len(rows)))
        if not tensor.is_packed:
            yield tensor, first * rows[0].numel() * rows.element_size(), rows
            continue
        parts.setdefault(tensor.name, []).append(rows.clone())
        if left[tensor.name]:
            continue
        waiting[tensor.name] = tensor
        if tensor.name.endswith(".lora_B.weight"):
            a = waiting.pop(tensor.name.replace(".lora_B.", ".lora_A."))
            packed = pack_lora(*(torch.cat(parts.pop(name)) for name in (a.name, tensor.name)))
            yield from ((one, 0, data) for one, data in zip((a, waiting.pop(tensor.name)), packed, strict=True))


def _metadata(empty: EmptyModel) -> dict[str, str]:
    """How it was trained and by what; nothing of the ranks, so that any layout writes the same file."""
    families = {part: asdict(lora) if lora else {} for part, lora in trained_families(empty).items()}
    return {
        "format": "pt",
        _FAMILIES: json.dumps(families),
        _TYPE: empty.model_type,
        ORIENTATION: "experts [out, in], lora_A expert by expert, lora_B rank by rank",
        "moetune.seed": str(empty.seed),
        "moetune.versions": versions(),
    }


def _card_lines(empty: EmptyModel, held: Iterable[Held]) -> list[FamilyLine]:
    sizes: dict[str, list[int]] = {}
    for tensor in held:
        sizes.setdefault(adapted_part(tensor.name), []).append(math.prod(tensor.shape))
    return [
        FamilyLine(part=part, how=_words(lora, True), tensors=len(sizes[part]), parameters=sum(sizes[part]))
        for part, lora in trained_families(empty).items()
    ]


def _config_text(config: LoraConfig) -> bytes:
    values: dict[str, Any] = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

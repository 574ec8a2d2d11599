"""Read an adapter that moetune wrote, to start training from it; its metadata records how each part was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from finetune.adapters.contents import lora_by_part, mode_text, read_families, trained_tensors
from finetune.adapters.keys import CONFIG, FAMILIES_KEY, MODEL_TYPE_KEY, WEIGHTS
from finetune.architecture.shapes import Shape
from finetune.files.tensorfile import Stored, read_header, read_tensor
from finetune.model.empty import EmptyModel
from finetune.model.lora import adapted_part
from moe.experts import ExpertLora as Lora
from moe.experts import GroupedExperts
from moe.names import PEFT_PREFIX
from moe.packing import unpack_lora


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An adapter of ours on disk, to start training from. All names are canonical."""

    folder: Path
    stored: Mapping[str, Stored]
    families: Mapping[str, Lora | None]
    model_type: str
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the base's tensors that the adapter replaces in full."""
        return {name: stored.shape for name, stored in self.stored.items() if ".lora_" not in name}

    @property
    def factors(self) -> set[str]:
        """Names of the low-rank factors."""
        return {name for name in self.stored if ".lora_" in name}

    def size(self, name: str, rows: range | None = None) -> int:
        """Bytes to read from the disk for the given rows of a tensor, or for all of it."""
        return self.stored[name].row_size * (self.stored[name].shape[0] if rows is None else len(rows))

    def row_bytes(self, name: str) -> int:
        """Bytes in memory of one row that was read."""
        return self.stored[name].row_size

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return the given rows of a tensor as it is stored, or all of it."""
        return read_tensor(self.stored[name], rows)

    def factor(self, name: str, owner: nn.Module) -> Tensor:
        """Return a factor in its owner's shape; for experts [L, r, in] or [L, out, r] with those of this rank."""
        if not isinstance(owner, GroupedExperts):
            return self.read(name)
        experts = owner.local_experts
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        a, b = (self.read(f"{stem}.{kind}.weight") for kind in ("lora_A", "lora_B"))
        pair = unpack_lora(stem, a, b, experts=owner.num_experts)
        return pair[kind == "lora_B"][experts.start : experts.stop]

    def check_fits(self, empty: EmptyModel) -> None:
        """Raise unless each tensor has a place in the model, which must use the same ranks and scales."""
        if self.model_type != empty.model_type:
            raise ValueError(f"{self.folder} adapts a {self.model_type}, but this base is a {empty.model_type}")
        trained = lora_by_part(empty)
        for part, lora in self.families.items():
            stored, now = mode_text(lora, True), mode_text(trained.get(part), part in trained)
            if stored != now:
                raise ValueError(
                    f"{self.folder} has {part} as {stored}, but adapters.{part} is {now}. Set adapters.{part} to match "
                    f"the adapter"
                )
        shapes = {
            tensor.name: tensor.shape for tensor in trained_tensors(empty) if adapted_part(tensor.name) in self.families
        }
        for name in {**shapes, **self.stored}:
            shape = self.stored[name].shape if name in self.stored else None
            if shape != shapes.get(name):
                raise ValueError(
                    f"{self.folder}: {name} is {_shape_text(shape)} in the adapter, {_shape_text(shapes.get(name))} in "
                    f"this model: the adapter was trained on another base, or the file is incomplete"
                )


def _shape_text(shape: Shape | None) -> str:
    return "absent" if shape is None else str(list(shape))


def is_ours(folder: Path) -> bool:
    """Return whether moetune wrote the adapter in a folder; adapters of other tools lack its metadata."""
    return (folder / WEIGHTS).is_file() and FAMILIES_KEY in read_header(folder / WEIGHTS)[1]


def open_adapter(folder: Path) -> AdapterFile:
    """Open an adapter that `write_adapter` wrote; tensors are read only when needed."""
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no adapter: {name} is missing")
    tensors, metadata = read_header(folder / WEIGHTS)
    if FAMILIES_KEY not in metadata:
        raise ValueError(
            f"{folder} holds an adapter of another tool: its metadata lacks {FAMILIES_KEY}, which records how each "
            f"part was trained. Training can continue only from an adapter that moetune wrote"
        )
    families = read_families(metadata[FAMILIES_KEY])
    stored = {name if ".lora_" in name else name.removeprefix(PEFT_PREFIX): entry for name, entry in tensors.items()}
    return AdapterFile(
        folder=folder,
        stored=stored,
        families=families,
        model_type=metadata.get(MODEL_TYPE_KEY, "model of unknown type"),
        metadata=metadata,
    )

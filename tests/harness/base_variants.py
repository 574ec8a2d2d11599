"""The weights of a tiny base, stored in every layout that a checkpoint may have."""

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from finetune.architecture.shapes import parameter_shapes
from finetune.files.hubconfig import read_family
from finetune.files.tiny import random_weights

Tensors = dict[str, Tensor]


def weights(base: Path) -> Tensors:
    """Return the tensors of a tiny base by canonical name, in memory orientation."""
    return dict(random_weights(parameter_shapes(read_family(base)), dtype="float32", seed=0))


def is_stack(name: str) -> bool:
    return name.endswith(("gate_up_proj", "experts.down_proj"))


def hub(tensors: Tensors) -> Tensors:
    return {name: t.transpose(1, 2).contiguous() if is_stack(name) else t for name, t in tensors.items()}


def per_expert(tensors: Tensors) -> Tensors:
    stored = {}
    for name, tensor in tensors.items():
        stem = name.rpartition(".")[0]
        for expert, matrix in enumerate(tensor) if is_stack(name) else ():
            if name.endswith("down_proj"):
                stored[f"{stem}.{expert}.down_proj.weight"] = matrix.clone()
            else:
                stored[f"{stem}.{expert}.gate_proj.weight"] = matrix[:40].clone()
                stored[f"{stem}.{expert}.up_proj.weight"] = matrix[40:].clone()
        if not is_stack(name):
            stored[name] = tensor
    return stored


def folder_with(parent: Path, base: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a folder with the base's config.json and one weight file, using the safetensors library."""
    folder = parent / "made"
    folder.mkdir(parents=True)
    shutil.copy(base / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder

"""The adapter beside each checkpoint: written by rank 0 from the files that all ranks have just written.

Nothing is gathered for it and no rank waits, so that it also comes with a checkpoint that is written behind the run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.adapters.contents import TrainedTensor, lora_by_part, trained_tensors
from finetune.adapters.provenance import Provenance
from finetune.adapters.write_trained import Piece, write_pieces
from finetune.checkpoint.manifest import Manifest
from finetune.checkpoint.stored import Tensors, open_tensors
from finetune.model.empty import EmptyModel
from moe.experts import GroupedExperts

FOLDER = "adapter"

AdapterWriter = Callable[[Path, Manifest], None]
"""Writes an adapter into an unfinished checkpoint that has all its tensors, and is going to have this manifest."""


def adapter_writer(empty: EmptyModel, *, base: str, provenance: Provenance) -> AdapterWriter | None:
    """Return what writes `adapter/` into a checkpoint; None where nothing is adapted, and the model itself trains."""
    if all(lora is None for lora in lora_by_part(empty).values()):
        return None
    trained = list(trained_tensors(empty))

    def write(folder: Path, manifest: Manifest) -> None:
        with open_tensors(folder) as tensors:
            write_pieces(
                empty,
                folder / FOLDER,
                trained,
                _pieces(trained, tensors),
                base=base,
                provenance=reached(provenance, manifest.state),
                extra={"step": str(manifest.step)},
                trained=False,
            )

    return write


def reached(provenance: Provenance, state: Mapping[str, Any]) -> Provenance:
    """Return where an adapter comes from with the data and the scores of a run's state."""
    data = state.get("data", {}).get("identity", {})
    return replace(provenance, data=data, scores=state.get("scores", {}))


def _pieces(trained: Iterable[TrainedTensor], tensors: Tensors) -> Iterator[Piece]:
    """Each tensor complete, as the engine would hand it out: its float32 master in the type of the weights."""
    for tensor in trained:
        shape = tuple(getattr(tensor.parameter, "ds_shape", tensor.parameter.shape))
        if isinstance(tensor.owner, GroupedExperts):
            shape = (tensor.experts, *shape[1:])
        yield tensor, 0, tensors.joined(f"master/{tensor.name}").view(shape).to(tensor.parameter.dtype)

"""Write an adapter into each checkpoint, on rank 0, from the files that all ranks have just written.

Nothing is gathered and no rank waits for it, so that an asynchronous checkpoint gets one as well.
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
"""Writes an adapter into an unfinished checkpoint that has all its tensors and will get this manifest."""


def adapter_writer(empty: EmptyModel, *, base: str, provenance: Provenance) -> AdapterWriter | None:
    """Return the function that writes `adapter/` into a checkpoint; None if no part is trained with LoRA."""
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
    """Return the provenance with the data and the scores of a run's state."""
    data = state.get("data", {}).get("identity", {})
    return replace(provenance, data=data, scores=state.get("scores", {}))


def _pieces(trained: Iterable[TrainedTensor], tensors: Tensors) -> Iterator[Piece]:
    """Yield each complete tensor as the engine would return it: its float32 master, cast to the weights' type."""
    for tensor in trained:
        shape = tuple(getattr(tensor.parameter, "ds_shape", tensor.parameter.shape))
        if isinstance(tensor.owner, GroupedExperts):
            shape = (tensor.experts, *shape[1:])
        yield tensor, 0, tensors.joined(f"master/{tensor.name}").view(shape).to(tensor.parameter.dtype)

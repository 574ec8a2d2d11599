"""The adapter beside each checkpoint: written by rank 0 from the files that all ranks have just written.

Nothing is gathered for it and no rank waits, so that it also comes with a checkpoint that is written behind the run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapters.contents import Held, held_tensors, trained_families
from finetune.adapters.file import write_pieces
from finetune.adapters.provenance import Provenance
from finetune.checkpoint.manifest import Manifest
from finetune.checkpoint.stored import Tensors, open_tensors
from finetune.model.empty import EmptyModel
from moe.experts import GroupedExperts

FOLDER = "adapter"

Beside = Callable[[Path, Manifest], None]
"""(an unfinished checkpoint with all its tensors, what it will say of itself)"""


def adapter_beside(empty: EmptyModel, *, base: str, provenance: Provenance) -> Beside | None:
    """Return what writes `adapter/` into a checkpoint; None where nothing is adapted, and the model itself trains."""
    if all(lora is None for lora in trained_families(empty).values()):
        return None
    held = list(held_tensors(empty))

    def write(folder: Path, manifest: Manifest) -> None:
        with open_tensors(folder) as tensors:
            write_pieces(
                empty, folder / FOLDER, held, _pieces(held, tensors), base=base,
                provenance=reached(provenance, manifest.state), extra={"step": str(manifest.step)}, trained=False,
            )  # fmt: skip

    return write


def reached(provenance: Provenance, state: Mapping[str, Any]) -> Provenance:
    """Return where an adapter comes from with the data and the scores of a run's state."""
    data = state.get("data", {}).get("identity", {})
    return replace(provenance, data=data, scores=state.get("scores", {}))


def _pieces(held: list[Held], tensors: Tensors) -> Iterator[tuple[Held, int, Tensor]]:
    """Each tensor whole, as the engine would hand it out: its float32 master in the type of the weights."""
    for one in held:
        shape = tuple(getattr(one.parameter, "ds_shape", one.parameter.shape))
        if isinstance(one.owner, GroupedExperts):
            shape = (one.experts, *shape[1:])
        yield one, 0, tensors.whole(f"master/{one.name}").view(shape).to(one.parameter.dtype)

"""What a run leaves when its last step is done: an adapter or a model, and their names for whoever follows it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from finetune.adapters.provenance import Provenance
from finetune.adapters.write_trained import write_adapter
from finetune.checkpoint.adapter import FOLDER
from finetune.checkpoint.folder import best_checkpoint
from finetune.checkpoint.manifest import read_manifest
from finetune.model.empty import EmptyModel
from finetune.model.gather import save
from finetune.model.lora import trainable_table
from finetune.ranks.collectives import barrier, rank_and_world
from finetune.training.track import Tracker


def hand_over(folder: Path, steps: int, tracker: Tracker, say: Callable[[str], None]) -> None:
    """Name the adapters of a run that has ended to whoever follows it: the last one, and the best."""
    if (folder / "adapter").exists():
        tracker.adapter(steps, folder / "adapter", aliases=["last"])
    best = best_checkpoint(folder / "checkpoints")
    if best is not None:
        say(f"best checkpoint: {best}")
        if (best / FOLDER).exists():
            tracker.adapter(read_manifest(best).step, best / FOLDER, aliases=["best"])


def write_learned(
    empty: EmptyModel, folder: Path, origin: Provenance, steps: range, say: Callable[[str], None]
) -> None:
    """Write what was learned in all, an adapter or the whole model; every rank must call this.

    A run that was over when it started has it already; one that went on replaces it.
    """
    is_adapter = any(row.lora is not None for row in trainable_table(empty))
    place = folder / ("adapter" if is_adapter else "model")
    there = place.exists()
    barrier()  # all have looked before rank 0 changes anything
    if there and not steps:
        say(f"{place.name}: {place}, of an earlier start")
        return
    if there and rank_and_world()[0] == 0:
        shutil.rmtree(place)
    if is_adapter:
        ended = {"step": str(steps.stop)}
        for line in write_adapter(empty, place, base=origin.base_name, provenance=origin, extra=ended):
            say(f"warning: {line}")
    else:
        save(empty, place, origin.base.folder)
    say(f"{place.name}: {place}")

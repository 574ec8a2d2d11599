"""Writes the result of a run after its last step: an adapter or a model."""

from collections.abc import Callable
from pathlib import Path

from finetune.adapters.media import media_files, trained_data
from finetune.adapters.provenance import Provenance
from finetune.adapters.write_trained import write_adapter
from finetune.checkpoint.adapter import FOLDER
from finetune.checkpoint.folder import best_checkpoint
from finetune.checkpoint.manifest import read_manifest
from finetune.files.atomic import REPLACED, is_marked
from finetune.model.empty import EmptyModel
from finetune.model.gather import save_model
from finetune.model.lora import trainable_table
from finetune.ranks.collectives import barrier
from finetune.tracking.track import Tracker


def hand_over(folder: Path, steps: int, tracker: Tracker, say: Callable[[str], None]) -> None:
    """Pass the last adapter of a run to the tracker, and its best one."""
    if (folder / "adapter").exists():
        tracker.adapter(steps, folder / "adapter", aliases=["last"])
    best = best_checkpoint(folder / "checkpoints")
    if best is not None:
        say(f"best checkpoint: {best}")
        if (best / FOLDER).exists():
            tracker.adapter(read_manifest(best).step, best / FOLDER, aliases=["best"])


def _which(folder: Path, step: int) -> str:
    """Say which of the run's adapters the last one is, and where the best one is."""
    best = best_checkpoint(folder / "checkpoints")
    if best is None:
        return "the last step's"
    at = read_manifest(best).step
    if at == step:
        return "the last step's, and the best by eval.metric"
    return f"the last step's; the best by eval.metric, of step {at}, is {best.relative_to(folder) / FOLDER}"


def write_learned(
    empty: EmptyModel, folder: Path, provenance: Provenance, steps: range, say: Callable[[str], None]
) -> None:
    """Write the result of the run, an adapter or the complete model; every rank must call this.

    A run that was already over when it started has written its result before. A run that went on replaces it once the
    new one is complete. A mark in the earlier result says that it is out of date.
    """
    is_adapter = any(row.lora is not None for row in trainable_table(empty))
    result = folder / ("adapter" if is_adapter else "model")
    is_written = result.exists() and not is_marked(result, REPLACED)
    barrier()  # all ranks have looked before rank 0 changes anything
    if is_written and not steps:
        say(f"{result.name}: {result}, written by an earlier start")
        return
    if is_adapter:
        warnings = write_adapter(
            empty,
            result,
            base=provenance.base_name,
            provenance=provenance,
            extra={"step": str(steps.stop), "which": _which(folder, steps.stop)},
            replace=True,
        )
        for line in warnings:
            say(f"warning: {line}")
    else:
        title = f"# {provenance.base_name}, fine-tuned\n\nTrained in full by moetune.\n"
        base, data = provenance.base.folder, trained_data(provenance.config, "the run's configuration")
        save_model(empty, result, base, changed=media_files(base, data, title=title), replace=True)
    say(f"{result.name}: {result}")

"""Manage the folder of a run's checkpoints: find the newest and the best, and remove old ones. No torch."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.checkpoint.manifest import BEST, LATEST, MANIFEST
from finetune.files.atomic import UNFINISHED, is_marked, sync_folder, write_file

_STEP = re.compile(r"step-(\d+)(?:\.replaced)?")


def find_latest(folder: Path) -> Path | None:
    """Return the checkpoint to continue from: the one in LATEST, else the complete one with most steps, else None."""
    return _named_by(folder / LATEST) or max(_finished(folder), key=_step, default=None)


def starting_point(folder: Path, resume: str) -> Path | None:
    """Return what `checkpoint.resume` (auto, never, or a path) means for a run whose checkpoints are in `folder`."""
    if resume in ("auto", "never"):
        return find_latest(folder) if resume == "auto" else None
    path = Path(resume)
    checkpoint = path if (path / MANIFEST).is_file() else find_latest(path)
    if checkpoint is None:
        raise ValueError(
            f"checkpoint.resume: {resume} is neither a checkpoint nor a folder of checkpoints; it must be auto, never "
            f"or a path"
        )
    return checkpoint


def make_room(final: Path) -> None:
    """Move aside an existing checkpoint of the same step; it stays valid until the new one is complete."""
    if final.exists():
        aside = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)


def point_and_prune(final: Path, keep: int, *, is_best: bool = False) -> None:
    """Name `final` in LATEST, and in BEST if it is the best; then remove old checkpoints.

    `keep` checkpoints stay, `final` among them, and the best one as well. Age is counted in steps, because clocks can
    be set back. Checkpoints of later steps than `final` belong to an abandoned start and are removed first. Remains of
    interrupted saves are removed too.
    """
    folder = final.parent
    for name in [BEST, LATEST] if is_best else [LATEST]:
        write_file(folder / f"{name}.partial", f"{final.name}\n".encode())
        (folder / f"{name}.partial").replace(folder / name)
    sync_folder(folder)
    best = best_checkpoint(folder)
    replaced = final.with_name(f"{final.name}.replaced")
    others = [path for path in _finished(folder) if path not in (final, replaced)]
    others.sort(key=lambda path: (_step(path) < _step(final), _step(path)), reverse=True)
    old = [path for path in others[keep - 1 :] if path != best]
    unfinished = [path for path in folder.glob("step-*.partial") if is_marked(path, UNFINISHED)]
    for path in [*unfinished, *old, *([replaced] if replaced.is_dir() else [])]:
        (path / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed checkpoint never looks complete
        shutil.rmtree(path)


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the best eval.metric; None if none was evaluated."""
    return _named_by(folder / BEST)


def _named_by(pointer: Path) -> Path | None:
    """The checkpoint that a pointer file names, if both exist."""
    if not pointer.is_file():
        return None
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{pointer} is damaged: it is not UTF-8, and must name a checkpoint (step-000120). Remove it, or name the "
            f"checkpoint to continue from: checkpoint.resume=PATH"
        ) from error
    if not _STEP.fullmatch(name):
        return None
    checkpoint = pointer.parent / name
    return checkpoint if (checkpoint / MANIFEST).is_file() else None


def _finished(folder: Path) -> Iterator[Path]:
    for path in folder.glob("step-*"):
        if _STEP.fullmatch(path.name) and (path / MANIFEST).is_file():
            yield path


def _step(path: Path) -> tuple[int, bool]:
    """The sort key of a checkpoint: its step; one that was moved aside comes before its replacement."""
    name = _STEP.fullmatch(path.name)
    assert name is not None, path
    return int(name[1]), not path.name.endswith(".replaced")

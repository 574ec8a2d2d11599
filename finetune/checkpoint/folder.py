"""The folder of a run's checkpoints: which is the newest, which the best, and which are removed. No torch."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.checkpoint.manifest import BEST, LATEST, MANIFEST
from finetune.files.atomic import sync_folder, write_file

_STEP = re.compile(r"step-(\d+)(?:\.replaced)?")


def find_latest(folder: Path) -> Path | None:
    """Return the checkpoint to continue from: the one that LATEST names, else the newest complete one, else None."""
    return _named_by(folder / LATEST) or max(_finished(folder), key=_age, default=None)


def starting_point(folder: Path, resume: str) -> Path | None:
    """Return what `checkpoint.resume` (auto, never, or a path) means for a run whose checkpoints are in `folder`."""
    if resume in ("auto", "never"):
        return find_latest(folder) if resume == "auto" else None
    path = Path(resume)
    checkpoint = path if (path / MANIFEST).is_file() else find_latest(path)
    if checkpoint is None:
        raise ValueError(
            f"checkpoint.resume: {resume} is neither a checkpoint nor a folder of checkpoints; auto, never and a path "
            f"are allowed"
        )
    return checkpoint


def make_room(final: Path) -> None:
    """Move aside a checkpoint of the same step; it counts until the new one is complete."""
    if final.exists():
        aside = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)


def point_and_prune(final: Path, keep: int, *, is_best: bool = False) -> None:
    """Name `final` in LATEST, and in BEST if it is the best; then remove all but the best and the newest `keep`.

    Remains of interrupted saves are removed too.
    """
    folder = final.parent
    for name in [BEST, LATEST] if is_best else [LATEST]:
        write_file(folder / f"{name}.partial", f"{final.name}\n".encode())
        (folder / f"{name}.partial").replace(folder / name)
    sync_folder(folder)
    by_age = sorted(_finished(folder), key=_age, reverse=True)
    best = best_checkpoint(folder)
    unfinished = [path for path in folder.glob("step-*.partial") if path.is_dir()]
    replaced = [path for path in by_age if path.name == f"{final.name}.replaced"]
    old = [path for path in by_age if path not in replaced][keep:]
    for path in [*unfinished, *replaced, *[path for path in old if path != best]]:
        (path / MANIFEST).unlink(missing_ok=True)  # first: what is half removed must not look complete
        shutil.rmtree(path)


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint where eval.metric was best; None where none was judged."""
    return _named_by(folder / BEST)


def _named_by(pointer: Path) -> Path | None:
    """The checkpoint whose name a file holds, if both are there."""
    if not pointer.is_file():
        return None
    checkpoint = pointer.parent / pointer.read_text().strip()
    return checkpoint if (checkpoint / MANIFEST).is_file() else None


def _finished(folder: Path) -> Iterator[Path]:
    for path in folder.glob("step-*"):
        if _STEP.fullmatch(path.name) and (path / MANIFEST).is_file():
            yield path


def _age(path: Path) -> tuple[int, str]:
    return (path / MANIFEST).stat().st_mtime_ns, path.name

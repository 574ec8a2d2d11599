"""The folder of a run: free, writable, with room for checkpoints, and able to continue from the newest. No torch."""

import os
import shutil
import tempfile
from collections.abc import Iterator

from finetune.architecture.families import Family
from finetune.checkpoint.folder import starting_point
from finetune.checkpoint.manifest import config_difference, is_trained_on, read_manifest, schedule_advice
from finetune.checkpoint.run_folder import FREE_IT, TAKEN, is_taken
from finetune.checkpoint.run_lock import holder_of
from finetune.config import RunConfig
from finetune.files.basefiles import BaseFiles
from finetune.files.fingerprint import fingerprint
from finetune.planner.plan import run_bytes, trained_elements
from finetune.ranks.log import listed
from finetune.settings.problems import Problem, problem
from finetune.settings.recipes import effective

PROBE_BYTES = 64 * 2**10
"""Bytes that a disk must take to count as one that can be written."""

AGAIN = "start again with another run.name or checkpoint.resume=never"


def lock_problems(config: RunConfig, run_id: str) -> Iterator[Problem]:
    """Yield a finding if another start works in the folder; `run_id` is that of the torchrun which follows, if any."""
    try:
        holder = holder_of(config.run.path, run_id=run_id, stall_seconds=config.run.stall_seconds)
    except ValueError as error:
        yield problem("run.name", config.run.name, str(error), "Otherwise set another run.name")
        return
    except OSError:  # the folder cannot be read; `room_problems` reports that
        return
    if holder is not None:
        remedy = "Wait for it to end, or set another run.name"
        yield problem("run.name", config.run.name, f"{config.run.path} is in use by {holder}", remedy)


def room_problems(config: RunConfig, base: Family) -> Iterator[Problem]:
    """Yield findings where nothing can be written, or less than the checkpoints and the adapter of the run take."""
    folder = config.run.path
    existing = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        text = f"{existing} cannot be written: {error.strerror}"
        yield problem("run.folder", config.run.folder, text, "Free some space there, or set run.folder to another disk")
        return
    parts = run_bytes(config, base, trained=trained_elements(config, base))
    earlier = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed, free = sum(parts.values()) - earlier, shutil.disk_usage(existing).free
    if free < needed:
        sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in parts.items())
        text = f"{existing} has {free / 1e9:,.1f} GB free, and the run still writes {needed / 1e9:,.1f} GB ({sizes})"
        remedy = "Free some space, lower checkpoint.keep, or set run.folder to another disk"
        yield problem("run.folder", config.run.folder, text, remedy)


def resume_problems(config: RunConfig, base: BaseFiles | None) -> Iterator[Problem]:
    """Yield problems that keep the run from continuing at its newest checkpoint, or from beginning in its folder."""
    folder, key = config.run.path, "checkpoint.resume"
    value = config.checkpoint.resume
    try:
        checkpoint = starting_point(folder / "checkpoints", value)
        saved = None if checkpoint is None else read_manifest(checkpoint)
    except (ValueError, OSError) as error:
        text = " ".join(str(error).removeprefix(f"{key}: ").split()).rstrip(".")
        yield problem(key, value, text, f"Resume from another checkpoint (checkpoint.resume=PATH), or {AGAIN}")
        return
    if checkpoint is None or saved is None:
        if is_taken(folder, config):
            yield problem("run.name", config.run.name, f"{folder} {TAKEN}", FREE_IT)
        return
    now = effective(config)
    different = config_difference(saved.config, now, done=saved.step)
    if different:
        text = f"{checkpoint} was saved under another configuration: {listed(different, between='; ')}"
        advice = schedule_advice(checkpoint, saved, now)
        yield problem(key, value, text, f"Restore these values to continue it, or {AGAIN}{advice}")
    if base is not None and not is_trained_on(saved, base, fingerprint(base)):
        text = f"{checkpoint} was trained on another base, {saved.base}"
        yield problem("model.path", config.model.path, text, f"Set model.path to the same weights, or {AGAIN}")

"""The JSON manifest of a checkpoint: its files, trained tensors, base and configuration.

No torch: the manifest is read and compared with the run before any tensor is touched.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from operator import index
from pathlib import Path
from typing import Any

from finetune.config import ScheduleConfig
from finetune.files.atomic import write_file
from finetune.files.basefiles import BaseFiles
from finetune.files.jsonblock import load_json
from finetune.files.tensorfile import Stored
from finetune.ranks.log import listed
from finetune.settings.schedule import first_difference
from finetune.settings.typed import leaves

MANIFEST = "manifest.json"
LATEST = "LATEST"
BEST = "BEST"
VERSION = 2
FREE = (
    "checkpoint.*",
    "eval.*",
    "track.*",
    "parallel.*",
    "stages.*.sp",
    "run.name",
    "run.folder",
    "run.idle_steps",
    "run.stall_seconds",
    "model.path",  # the base's fingerprint is compared instead
    "model.attention",  # like parallel.*: the same sums in another order
    "moe.dispatch",
    "optim.offload",
    "data.sources.*.path",  # the state of the data identifies its content
    "data.sources.*.map*",
    "data.sources.*.config",
    "data.sources.*.split",
    "data.media_root",
    "data.allow_private_addresses",
    "data.cache_dir",
    "data.cache_gb",
    "data.workers",
    "data.prefetch",
    "data.stall_seconds",
    "data.max_bad_samples",
    "data.video.timeout_seconds",
)
"""Keys that may change between save and resume, because they do not affect the training result."""
_KINDS: Mapping[str, type] = {
    "step": int,
    "ranks": int,
    "ep": int,
    "base": str,
    "base_fingerprint": str,
    "random": list,
    "state": dict,
    "config": dict,
}
ANOTHER = "Resume from another checkpoint: checkpoint.resume=PATH"
_SAMPLE_BYTES = 4096
_SCHEDULE = "schedule."


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained tensor: its full shape, and its number of optimiser updates."""

    shape: tuple[int, ...]
    updates: int


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of tensors: its size and its checksum."""

    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in a checkpoint that is not a tensor."""

    step: int
    ranks: int
    ep: int
    base: str
    base_fingerprint: str
    trained: Mapping[str, Trained]
    random: tuple[str, ...]
    """Kinds of devices whose random states each rank saved."""
    files: Mapping[str, File]
    state: Mapping[str, Any]
    config: Mapping[str, Any]
    config_hash: str


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and sync it to the disk."""
    content = {"version": VERSION, **asdict(manifest)}
    content["digest"] = _digest(content)
    write_file(folder / MANIFEST, json.dumps(content, indent=1, allow_nan=False).encode())


def _digest(content: Mapping[str, Any]) -> str:
    """A hash of a manifest's content as it reads back from JSON."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check the sizes of its files; one ValueError names all damaged files."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is not a finished checkpoint: it has no {MANIFEST}. Name a step-* folder that has one in "
            f"checkpoint.resume, or use auto"
        )
    content = _content(folder / MANIFEST)
    with known_form(folder):
        manifest = _manifest(content)
    damaged = []
    for name, file in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None:
            damaged.append(f"{name} is missing")
        elif size != file.bytes:
            damaged.append(f"{name} has {size} bytes, not {file.bytes}")
    if damaged:
        raise ValueError(f"{folder} is damaged: {listed(damaged, between='; ')}. {ANOTHER}")
    return manifest


@contextmanager
def known_form(folder: Path) -> Iterator[None]:
    """Turn what fails while the block reads a manifest's content into a ValueError that names the manifest."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / MANIFEST} is not what moetune writes ({what}). {ANOTHER}") from error


def _content(file: Path) -> dict[str, Any]:
    """Return a manifest's content; raise unless it matches its digest."""
    try:
        content = load_json(file)
    except ValueError as error:
        raise ValueError(f"{error}. {ANOTHER}") from error
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{file} has version {version}; this moetune reads version {VERSION}")
    if content.pop("digest", None) != _digest({"version": version, **content}):
        raise ValueError(f"{file} was changed after it was written. {ANOTHER}")
    return content


def _manifest(content: Mapping[str, Any]) -> Manifest:
    """Convert the content to a manifest; raises one of three error types if its form is wrong."""
    for key, kind in _KINDS.items():
        if not isinstance(content[key], kind):
            raise TypeError(f"{key} is {str(content[key])[:40]!r}")
    files = {name: File(**entry) for name, entry in content["files"].items()}
    trained = {
        name: Trained(shape=tuple(map(index, entry["shape"])), updates=index(entry["updates"]))
        for name, entry in content["trained"].items()
    }
    return Manifest(**{**content, "trained": trained, "files": files, "random": tuple(content["random"])})


def require_same_run(
    folder: Path,
    saved: Manifest,
    *,
    config: Mapping[str, Any],
    base: BaseFiles,
    fingerprint: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise one ValueError that says what differs, unless a run with this config and model can continue exactly."""
    different = config_difference(saved.config, config, done=saved.step)
    if different:
        raise ValueError(
            f"{folder} was saved under another configuration:\n  {listed(different, between=chr(10) + '  ')}\n"
            f"Restore these values to continue it; or start again with another run.name or checkpoint.resume=never"
            + schedule_advice(folder, saved, config)
        )
    if not is_trained_on(saved, base, fingerprint):
        raise ValueError(
            f"{folder} was trained on another base: {saved.base} ({saved.base_fingerprint[:12]}), but model.path is "
            f"{base.folder} ({fingerprint[:12]}). Set model.path to the same weights"
        )
    saved_shapes = {name: trained.shape for name, trained in saved.trained.items()}
    lines = [
        f"{name}: {_shape_text(saved_shapes.get(name))} in the checkpoint, {_shape_text(shapes.get(name))} now"
        for name in {**saved_shapes, **shapes}
        if saved_shapes.get(name) != shapes.get(name)
    ]
    if lines:
        raise ValueError(
            f"{folder} trained other parameters:\n  {listed(lines, between=chr(10) + '  ')}\n"
            f"Set adapters.* as in that run, or start again with another run.name"
        )


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a hash of the keys that affect the training, which are all except those in `FREE`."""
    return hashlib.sha256(json.dumps(_binding(config), sort_keys=True).encode()).hexdigest()


def config_difference(saved: Mapping[str, Any], now: Mapping[str, Any], *, done: int | None = None) -> list[str]:
    """Return a line for each key that affects the training and differs.

    After `done` steps the schedule may differ in what does not change the learning rates of those.
    """
    lines = _lines(_binding(saved), _binding(now))
    if done is None or not _goes_on(_schedule(saved), _schedule(now), done):
        return lines
    return [line for line in lines if not line.startswith(_SCHEDULE)]


def schedule_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each key of the schedule that differs."""
    return [line for line in _lines(_binding(saved), _binding(now)) if line.startswith(_SCHEDULE)]


def _goes_on(saved: ScheduleConfig, now: ScheduleConfig, done: int) -> bool:
    """Say whether a run that took `done` steps of one schedule is a run of the other so far."""
    if not now.steps:
        return True  # epochs that are not counted yet: known when the data are open
    first = first_difference(saved, now)
    return now.steps >= done and (first is None or first >= done)


def _schedule(config: Mapping[str, Any]) -> ScheduleConfig:
    known = {field.name for field in fields(ScheduleConfig)}
    return ScheduleConfig(**{key: value for key, value in config.get("schedule", {}).items() if key in known})


def schedule_advice(folder: Path, saved: Manifest, config: Mapping[str, Any]) -> str:
    """Return what to do where the schedule differs: nothing else may have changed."""
    before, now = _schedule(saved.config), _schedule(config)
    if _goes_on(before, now, saved.step):
        return ""
    if now.steps < saved.step:
        return f". It has taken {saved.step} steps, and schedule.steps cannot be below that"
    first = first_difference(before, now)
    advice = (
        f". The learning rates of the {saved.step} steps taken depend on the schedule ({before.shape}). To train on "
        f"from what was learned, start another run with adapters.start_from={folder / 'adapter'}"
    )
    if before.shape == "wsd" and first:
        advice += f"; or resume from a checkpoint of at most {first} steps, before the decay: checkpoint.resume=PATH"
    return advice


def _lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    absent = object()
    keys = [key for key in {**old, **new} if old.get(key, absent) != new.get(key, absent)]
    return [f"{key}: {_value(old, key)} in the checkpoint, {_value(new, key)} now" for key in keys]


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = leaves(json.loads(json.dumps(config)))  # tuples become lists, as in a file
    if not flat.get("schedule.epochs"):
        flat.pop("schedule.epochs", None)  # a key that older checkpoints do not have
    elif not flat["schedule.steps"]:
        del flat["schedule.steps"]  # they follow from the epochs, and are not counted yet
    return {key: value for key, value in flat.items() if not any(fnmatchcase(key, free) for free in FREE)}


def _value(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def is_trained_on(saved: Manifest, base: BaseFiles, fingerprint: str) -> bool:
    """Say whether a checkpoint was trained on this base."""
    if len(saved.base_fingerprint) == len(fingerprint):
        return saved.base_fingerprint == fingerprint
    return saved.base_fingerprint == file_fingerprint(base.stored.values())


def file_fingerprint(stored: Iterable[Stored]) -> str:
    """Return the hash by which older manifests identify a base, made from its files' headers and some of their bytes.

    Unlike today's fingerprint, it differs between the layouts and shardings of one base.
    """
    files: dict[Path, list[Stored]] = {}
    for tensor in stored:
        files.setdefault(tensor.file, []).append(tensor)
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        size = file.stat().st_size
        entries = sorted((tensor.name, tensor.dtype, tensor.shape, tensor.begin) for tensor in files[file])
        digest.update(repr((file.name, size, entries)).encode())
        first = min(tensor.begin for tensor in files[file])
        with file.open("rb") as handle:
            for at in (first, (first + size) // 2, max(first, size - _SAMPLE_BYTES)):
                handle.seek(at)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()

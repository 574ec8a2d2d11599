"""What a merge will read and write, known before anything is written: files, tensors, bytes, room on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.config import DataConfig
from finetune.adapters.media import media_files, trained_data
from finetune.adapters.provenance import CONFIGURATION, recorded, require_same_base, seen_settings
from finetune.adapters.source import AdapterSource, open_source
from finetune.architecture.shapes import Shape
from finetune.architecture.yarn import Extension, extension
from finetune.config import ContextConfig, YarnConfig
from finetune.files.basefiles import BaseFiles
from finetune.files.hubconfig import read_family
from finetune.files.jsonblock import load_json
from finetune.files.layouts import HUB_METADATA, stored_shape
from finetune.files.tensorfile import file_size
from finetune.files.writer import REPORT, links_outside, plan_shards, side_files_of


@dataclass(frozen=True, kw_only=True)
class OutFile:
    """A weight file to be written: its tensors in order, (dtype, shape) by name."""

    name: str
    tensors: Mapping[str, tuple[str, Shape]]

    @property
    def size(self) -> int:
        """Bytes of the file, its header included."""
        return file_size(self.tensors, HUB_METADATA)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A base, an adapter that fits it, and the files that will hold their sum."""

    base: BaseFiles
    source: AdapterSource
    files: tuple[OutFile, ...]
    side_files: Mapping[str, bytes | Path]
    origin: str
    """What is known of the adapter's base, in a sentence."""
    context: Extension | None = None
    """How the adapter was trained to read longer contexts; the merged config.json says so."""
    seen: Mapping[str, Any] = field(default_factory=dict)
    """What of the adapter's configuration decides an answer, but for its context; empty where it does not say."""
    data: DataConfig | None = None
    """How images, videos and conversations were prepared in training; None where the adapter does not say."""

    @property
    def need_bytes(self) -> int:
        """Room that the merged folder takes."""
        small = [
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in self.side_files.values()
        ]
        return sum(file.size for file in self.files) + sum(small)

    @property
    def intended(self) -> int:
        """How many tensors of the base the adapter changes."""
        return len(self.source.changes) + len(self.source.full)

    def lines(self, out: Path) -> list[str]:
        """Say it for people."""
        experts = sum(len(change.shape) == 3 for change in self.source.changes.values())
        kinds = ", ".join(sorted({kind for file in self.files for kind, _ in file.tensors.values()}))
        total = len(self.base.shapes)
        media = [name for name, content in self.side_files.items() if isinstance(content, bytes)]
        outside = [name for name in links_outside(self.base.folder) if not name.endswith(".safetensors")]
        longer = f"; config.json says {self.context.length:,} tokens, yarn" if self.context is not None else ""
        return [
            f"base     {self.base.folder}: {total} tensors of {kinds}, layout {self.base.layout}",
            f"adapter  {self.source.folder}: {len(self.source.changes)} low-rank changes ({experts} of expert stacks), "
            f"{len(self.source.full)} tensors in full; {self.origin}",
            f"out      {out}: {len(self.files)} weight file(s) and {len(self.side_files) + 1} others in the hub's "
            f"layout, {self.need_bytes:,} bytes; free there: {free_bytes(out):,}{longer}",
            *([f"left out {', '.join(outside)}: links to files outside of {self.base.folder}"] if outside else []),
            *([f"media    {', '.join(media)}: with the sizes and frames of training"] if media else []),
        ]


def plan_merge(base: BaseFiles, adapter: Path, *, other_base: bool = False) -> MergePlan:
    """Return the plan; raises where the adapter was trained on another base, unless `other_base` allows that."""
    source = open_source(adapter, base.shapes)
    origin = "merged into another base on purpose" if other_base else require_same_base(adapter, source.metadata, base)
    source.check_copies(base)
    learned = any(bool(change.read()[1].any()) for change in source.changes.values())
    if not learned and not source.full:
        raise ValueError(f"{adapter} changes nothing: every lora_B in it is zero. Was it saved before its first step?")
    seen = _seen(source, base.folder)
    data = trained_data(seen, f"the configuration in {adapter}") if "data" in seen else None
    title = f"# {base.folder.name}, fine-tuned\n\nMerged by moetune; `{REPORT}` says from what.\n"
    media = media_files(base.folder, data, title=title) if data is not None else {}
    return MergePlan(
        base=base,
        source=source,
        files=_out_files(base),
        side_files={**side_files_of(base.folder), **media},
        origin=origin,
        context=_context(source, base.folder),
        seen=seen,
        data=data,
    )


def merge_settings(folder: Path) -> dict[str, Any]:
    """Return what a merged folder says of the settings that its adapter was trained with, empty where nothing."""
    seen = load_json(folder / REPORT).get("trained_with", {}) if (folder / REPORT).is_file() else {}
    if not isinstance(seen, dict):
        raise ValueError(
            f"{folder / REPORT}: trained_with is {str(seen)[:80]!r}, it must be an object. The file is damaged: merge "
            f"again, or remove it and pass the settings with --config"
        )
    return seen


def _seen(source: AdapterSource, base: Path) -> dict[str, Any]:
    seen: dict[str, Any] = seen_settings(source.metadata) or merge_settings(base)
    return {section: values for section, values in seen.items() if section != "context"}


def _context(source: AdapterSource, base: Path) -> Extension | None:
    """The extension of context that the adapter's own configuration records."""
    context = recorded(source.metadata, CONFIGURATION).get("context") or {}
    yarn = YarnConfig(factor=(context.get("yarn") or {}).get("factor"))
    return extension(ContextConfig(length=context.get("length"), yarn=yarn), read_family(base))


def check_room(plan: MergePlan, out: Path) -> None:
    """Raise when the disk cannot hold the merged folder, or it would become a part of the base."""
    if out.resolve().is_relative_to(plan.base.folder.resolve()):
        raise ValueError(
            f"{out} lies inside the base {plan.base.folder}, and would be copied with the base's files from now on. "
            f"Name a folder outside it"
        )
    free = free_bytes(out)
    if free < plan.need_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the merged folder needs {plan.need_bytes:,} bytes and the disk that holds {out.parent} has {free:,} "
            f"free; nothing was written. Free room, or write to another disk",
        )


def free_bytes(out: Path) -> int:
    """Return the bytes that a user may still write where `out` will lie."""
    place = out.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _out_files(base: BaseFiles) -> tuple[OutFile, ...]:
    """The base's own division into files where each tensor lies in one; else one by size."""
    kinds = base.dtypes
    stored = {name: (kinds[name], stored_shape(name, shape, "hub")) for name, shape in base.shapes.items()}
    if all(name in base.stored for name in stored):
        groups: dict[str, dict[str, tuple[str, Shape]]] = {}
        for name in sorted(stored, key=lambda name: (base.stored[name].file.name, base.stored[name].begin)):
            groups.setdefault(base.stored[name].file.name, {})[name] = stored[name]
    else:
        groups = plan_shards(stored)
    return tuple(OutFile(name=file, tensors=tensors) for file, tensors in groups.items())


def jobs_for(files: int, jobs: int = 0) -> int:
    """Return how many files to work on at once: `jobs`, or one more than there are cores, as one waits for the disk."""
    return max(1, min(jobs or len(os.sched_getaffinity(0)) + 1, files))

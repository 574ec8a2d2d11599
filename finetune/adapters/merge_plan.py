"""Plan a merge before anything is written: files, tensors, bytes and disk space."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.format.printable import count_of
from finetune.adapters.media import media_files, trained_data
from finetune.adapters.merge_fp8 import merged_types
from finetune.adapters.provenance import (
    CONFIGURATION,
    other_base_text,
    quantised_in_training,
    recorded,
    require_same_base,
    seen_settings,
)
from finetune.adapters.source import AdapterSource, open_source
from finetune.architecture.shapes import Shape
from finetune.architecture.yarn import Extension, extension
from finetune.config import ContextConfig, YarnConfig
from finetune.files.basefiles import BaseFiles
from finetune.files.fp8 import with_scales
from finetune.files.hubconfig import read_family
from finetune.files.jsonblock import load_json
from finetune.files.layouts import HUB_METADATA, stored_shape
from finetune.files.tensorfile import file_size
from finetune.files.writer import REPORT, SHARD_BYTES, links_outside, plan_shards, side_files_of


@dataclass(frozen=True, kw_only=True)
class OutFile:
    """A weight file to write: its tensors in order, as (dtype, shape) by name."""

    name: str
    tensors: Mapping[str, tuple[str, Shape]]

    @property
    def size(self) -> int:
        """Size of the file in bytes, header included."""
        return file_size(self.tensors, HUB_METADATA)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A base, an adapter that fits it, and the files that will hold their sum."""

    base: BaseFiles
    source: AdapterSource
    files: tuple[OutFile, ...]
    side_files: Mapping[str, bytes | Path]
    origin: str
    """Return a sentence on the base that the adapter's metadata names."""
    context: Extension | None = None
    """The context extension of the training, which the merged config.json records."""
    seen: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the adapter's configuration that affect answers, without its context; empty if unknown."""
    data: DataConfig | None = None
    """How training prepared images, videos and conversations; None if unknown."""
    dtype: str | None = None
    """The type that was asked for; None for the base's own."""

    @property
    def types(self) -> dict[str, str]:
        """The type of each tensor in the merged folder, by canonical name."""
        return {
            name: kind for file in self.files for name, (kind, _) in file.tensors.items() if name in self.base.shapes
        }

    @property
    def need_bytes(self) -> int:
        """Bytes that the merged folder will take."""
        small = [
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in self.side_files.values()
        ]
        return sum(file.size for file in self.files) + sum(small)

    @property
    def intended(self) -> int:
        """Number of base tensors that the adapter changes."""
        return len(self.source.changes) + len(self.source.full)

    def lines(self, out: Path) -> list[str]:
        """Return the plan as lines for people."""
        experts = sum(len(change.shape) == 3 for change in self.source.changes.values())
        kinds = ", ".join(sorted(set(self.base.dtypes.values())))
        total = len(self.base.shapes)
        media = [name for name, content in self.side_files.items() if isinstance(content, bytes)]
        outside = [name for name in links_outside(self.base.folder) if not name.endswith(".safetensors")]
        forms = quantised_in_training(self.source.metadata)
        longer = f"; config.json has {self.context.length:,} tokens, yarn" if self.context is not None else ""
        written = ", ".join(sorted(set(self.types.values())))
        converted = f"; written as {written}" if written != kinds else ""
        return [
            f"base     {self.base.folder}: {total} tensors of {kinds}, layout {self.base.layout}",
            f"adapter  {self.source.folder}: {len(self.source.changes)} low-rank changes ({experts} of expert stacks), "
            f"{len(self.source.full)} full tensors; {self.origin}",
            f"out      {out}: {count_of(len(self.files), 'weight file')} and {len(self.side_files) + 1} others in the "
            f"hub's layout, {self.need_bytes:,} bytes; free there: {free_bytes(out):,}{longer}{converted}",
            *(
                [f"note     it trained beside quantised weights ({forms}); here it is added to the base's own"]
                * bool(forms)
            ),
            *([f"left out {', '.join(outside)}: links to files outside {self.base.folder}"] if outside else []),
            *([f"media    {', '.join(media)}: with the sizes and frame settings of training"] if media else []),
        ]


def plan_merge(
    base: BaseFiles,
    adapter: Path,
    *,
    other_base: bool = False,
    shard_bytes: int | None = None,
    dtype: str | None = None,
) -> MergePlan:
    """Return the plan. Raise if the adapter was trained on another base, unless `other_base` allows that.

    Without `shard_bytes` the merged folder has the base's own files, and without `dtype` the base's own types.
    """
    types = merged_types(base, dtype)
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"--shard-bytes is {shard_bytes}; it must be a number from 1 on, 5000000000 is usual")
    source = open_source(adapter, base.shapes)
    origin = other_base_text(source.metadata, base) if other_base else require_same_base(adapter, source.metadata, base)
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
        files=_out_files(base, types, shard_bytes),
        side_files={**side_files_of(base.folder), **media},
        origin=origin,
        context=recorded_context(source, base.folder),
        seen=seen,
        data=data,
        dtype=dtype,
    )


def merge_settings(folder: Path) -> dict[str, Any]:
    """Return the training settings that a merged folder records for its adapter; empty if there are none."""
    seen = load_json(folder / REPORT).get("trained_with", {}) if (folder / REPORT).is_file() else {}
    if not isinstance(seen, dict):
        raise ValueError(
            f"{folder / REPORT}: trained_with is {str(seen)[:80]!r}; it must be an object. The file is damaged: merge "
            f"again, or remove it and pass the settings with --config"
        )
    return seen


def _seen(source: AdapterSource, base: Path) -> dict[str, Any]:
    seen: dict[str, Any] = seen_settings(source.metadata) or merge_settings(base)
    return {section: values for section, values in seen.items() if section not in ("context", "model")}


def recorded_context(source: AdapterSource, base: Path) -> Extension | None:
    """Return the context extension that the adapter's own configuration records."""
    context = recorded(source.metadata, CONFIGURATION).get("context") or {}
    yarn = YarnConfig(factor=(context.get("yarn") or {}).get("factor"))
    return extension(ContextConfig(length=context.get("length"), yarn=yarn), read_family(base))


def check_room(plan: MergePlan, out: Path) -> None:
    """Raise if the disk cannot hold the merged folder, or if it would lie inside the base."""
    if out.resolve().is_relative_to(plan.base.folder.resolve()):
        raise ValueError(
            f"{out} lies inside the base {plan.base.folder}, so every later copy of the base would include it. Name a "
            f"folder outside the base"
        )
    free = free_bytes(out)
    if free < plan.need_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the merged folder needs {plan.need_bytes:,} bytes, but the disk of {out.parent} has only {free:,} "
            f"free; nothing was written. Free some space, or write to another disk",
        )


def free_bytes(out: Path) -> int:
    """Return the free bytes on the disk that will hold `out`."""
    place = out.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _out_files(base: BaseFiles, types: Mapping[str, str], shard_bytes: int | None) -> tuple[OutFile, ...]:
    """Return the base's own division into files if no tensor spans files and no size is given, else one by size."""
    stored = {name: (types[name], stored_shape(name, shape, "hub")) for name, shape in base.shapes.items()}
    if shard_bytes is None and all(name in base.stored for name in stored):
        groups: dict[str, dict[str, tuple[str, Shape]]] = {}
        for name in sorted(stored, key=lambda name: (base.stored[name].file.name, base.stored[name].begin)):
            groups.setdefault(base.stored[name].file.name, {})[name] = stored[name]
    else:
        groups = plan_shards(with_scales(stored), shard_bytes or SHARD_BYTES)
    return tuple(OutFile(name=file, tensors=with_scales(tensors)) for file, tensors in groups.items())


def jobs_for(files: int, jobs: int = 0) -> int:
    """Return the number of files to work on at once: `jobs`, or one more than the cores, as one waits for the disk."""
    return max(1, min(jobs or len(os.sched_getaffinity(0)) + 1, files))

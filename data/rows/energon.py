"""Energon's folders: the fields of `.nv-meta/dataset.yaml` as a `map`, and its parts. Nothing of them is run."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from data.format.record import load_json
from data.rows.columns import Columns

META = ".nv-meta"
_FIELDS = {
    "Captioning": {"image": "image", "caption": "caption"},
    "Interleaved": {"sequence": "sequence"},
    "OCR": {"image": "image", "text": "text"},
    "VQA": {"image": "image", "context": "question", "answers": "answers"},
    "VidQA": {"video": "video", "context": "question", "answers": "answers"},
}
"""Energon's types of samples, and what their fields are called here."""
_PYTHON = ("sample_loader", "part_filter")
_DEEPEST = 4
"""Folders of shards below the folder with the notes."""


def energon_columns(shard: Path) -> Columns | None:
    """Return the fields that the notes above a shard declare; None where there are none."""
    for folder in list(shard.absolute().parents)[:_DEEPEST]:
        note = folder / META / "dataset.yaml"
        if note.is_file():
            return _columns(note, note.stat().st_mtime_ns)
    return None


@lru_cache(maxsize=64)
def _columns(note: Path, changed: int) -> Columns:
    raw = _read(note)
    for name in _PYTHON:
        if name in raw:
            raise ValueError(
                f"{note} names its fields by {name}={raw[name]!r:.80}, which is Python, and no code of a data set is "
                f"run. Name the members with data.sources.<name>.map"
            )
    kind = raw.get("sample_type", raw)
    name = re.sub(r"(Sample|Webdataset)$", "", str(kind.get("__class__", "")) if isinstance(kind, Mapping) else "")
    fields = raw.get("field_map")
    if name not in _FIELDS or not isinstance(fields, Mapping):
        raise ValueError(
            f"{note} declares samples of {name or 'no class'}{'' if fields else ' without a field_map'}; read are "
            f"{', '.join(_FIELDS)} with a field_map. Name the members with data.sources.<name>.map"
        )
    ours = _FIELDS[name]
    return Columns.of({ours[theirs]: _members(str(text)) for theirs, text in fields.items() if theirs in ours})


def _members(text: str) -> list[str]:
    """Return the names that a field is read from: `jpg,png` are alternatives, `json[a][b]` is a key inside one."""
    return [re.sub(r"\[([^\]]*)\]", r".\1", name.strip()) for name in text.split(",")]


def energon_shards(folder: Path, split: str) -> list[str] | None:
    """Return the names or patterns of a part's shards, by split.yaml or split.json; None where there is neither."""
    notes = [folder / META / name for name in ("split.yaml", "split.json")]
    note = next((note for note in notes if note.is_file()), None)
    if note is None:
        return None
    raw = _read(note)
    parts = raw.get("split_parts")
    wanted = split or "train"
    if not isinstance(parts, Mapping) or not isinstance(parts.get(wanted), list):
        known = ", ".join(map(str, parts)) if isinstance(parts, Mapping) else "none"
        raise ValueError(f"{note} has no part {wanted!r} (known: {known}); name one with `split`")
    left_out = {str(name) for name in raw.get("exclude") or () if "/" not in str(name)}
    names = [str(name) for name in parts[wanted] if str(name) not in left_out]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{note} names the shard {name!r}, which leads out of {folder}")
    return names


def _read(note: Path) -> Mapping[str, Any]:
    try:
        raw = (
            load_json(note.read_bytes()) if note.suffix == ".json" else yaml.safe_load(note.read_text(encoding="utf-8"))
        )
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{note} cannot be read: {error}") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"{note} holds a {type(raw).__name__}; Energon writes an object")
    return raw

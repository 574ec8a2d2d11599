"""The files that the rows of a source are in: one, a pattern, or a folder as `datasets` or a hub keeps it.

A remote address is not read here; whoever reads one fetches its files and passes the folder.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from data.config import SourceConfig
from data.format.record import load_json
from data.rows.columns import Columns, nearest
from data.rows.containers import READERS, count_rows, kind_of, origin_of, read_rows
from data.rows.energon import META

_SPLIT = re.compile(r"(?:^|[-_./])(training|train|validation|valid|val|dev|testing|test|eval)(?=$|[-_./])")
_MEANING = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
_MEANING |= {"testing": "test", "eval": "test"}
_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "build.json", "rejects.jsonl")
_ONE_FILE = "it is one file of rows, and only a folder has parts to choose from"


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """The place of rows, and how they are to be read."""

    path: Path
    columns: Columns = field(default_factory=Columns)
    config: str = ""
    split: str = ""

    @property
    def suffix(self) -> str:
        """A suffix of file names that depend on what is chosen; empty for the default."""
        chosen = (self.columns.text, self.config, self.split)
        return f"-{blake2b(repr(chosen).encode(), digest_size=4).hexdigest()}" if any(chosen) else ""


def row_source(source: SourceConfig) -> RowSource:
    """Return the rows that a source of a recipe names."""
    return RowSource(path=Path(source.path), columns=Columns.of(source.map), config=source.config, split=source.split)


def is_rows(path: str) -> bool:
    """Say whether a source is rows, which are converted into shards, and not shards themselves."""
    if kind_of(Path(path)) in READERS:
        return "://" not in path
    folder = Path(path)
    if not folder.is_dir() or (folder / META).is_dir() or any(map(_is_tar, folder.iterdir())):
        return False
    return next(_data_files(folder), None) is not None


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def is_pattern(path: Path) -> bool:
    """Say whether a path stands for all files that match it."""
    return any(mark in str(path) for mark in "*?[")


def row_files(source: RowSource) -> list[Path]:
    """Return the files of a source in order; ValueError if the config or split to read is not clear."""
    path = source.path
    if path.is_dir():
        files = _files_of_folder(source)
    elif path.is_file():
        files = [path]
    elif is_pattern(path):
        files = sorted(map(Path, glob(str(path))))  # noqa: PTH207  # Path.glob refuses absolute patterns
    else:
        raise ValueError(f"{path} does not exist")
    if not path.is_dir() and (source.config or source.split):
        raise ValueError(f"config and split do not apply to {path}: {_ONE_FILE}")
    if not files:
        raise ValueError(f"{path} names no file of rows")
    return files


def read_source(source: RowSource) -> Iterator[tuple[int, Any, Path]]:
    """Yield number (from 1, over all files), row, and the folder where the relative paths of the row begin."""
    before = 0
    for path in row_files(source):
        number, origin = 0, origin_of(path)
        for number, row in read_rows(path):
            yield before + number, row, origin
        before += number


def count_source(source: RowSource) -> int:
    """Count the rows of all files where that is quick; 0 where it is not."""
    counts = [count_rows(path) for path in row_files(source)]
    return sum(counts) if all(counts) else 0


def stamp_of_rows(source: RowSource) -> str:
    """Return a hash of the content of all files."""
    digest = blake2b(digest_size=8)
    files = row_files(source)
    for path in files:
        if len(files) > 1:
            digest.update(f"{path.name} {path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _files_of_folder(source: RowSource) -> list[Path]:
    folder = source.path
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        splits = _noted(folder / "dataset_dict.json", "splits", str)
        return _saved(_inside(folder, _chosen_split(source, {split: split for split in splits})))
    if (folder / "state.json").is_file():  # Dataset.save_to_disk
        return _saved(folder)
    if configs := _configs_of_card(folder):
        return _files_of_card(source, configs)
    return _files_by_name(source)


def _saved(folder: Path) -> list[Path]:
    """Return the arrow files of a saved data set in the order of its state."""
    names = [entry.get("filename", "") for entry in _noted(folder / "state.json", "_data_files", dict)]
    return [_inside(folder, str(name)) for name in names]


def _noted(note: Path, key: str, kind: type) -> list[Any]:
    """Return a list that `datasets` wrote into a note."""
    raw = load_json(note.read_bytes()) if note.is_file() else None
    listed = raw.get(key) if isinstance(raw, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(item, kind) for item in listed):
        raise ValueError(f"{note} has no list {key!r}; it is not what `datasets` saves")
    return listed


def _inside(folder: Path, name: str) -> Path:
    """Return a file of the folder; a name that leads out of it is refused."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names the file {name!r}, which leads out of it")
    return folder / name


def _configs_of_card(folder: Path) -> dict[str, Any]:
    """Return `configs` of the head of README.md by name, with the names of their files by split."""
    card = folder / "README.md"
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    try:
        listed = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{card} begins with a head that is not YAML: {error}") from error
    out: dict[str, Any] = {}
    for entry in listed or ():
        files = entry.get("data_files") if isinstance(entry, Mapping) else None
        if not files:  # a folder of its own, or nothing but a viewer's settings
            continue
        name = str(entry.get("config_name", "default"))
        out[name] = {"files": _files_by_split(files, f"{card}, config {name}"), "default": entry.get("default", False)}
    return out


def _files_by_split(files: Any, where: str) -> Mapping[str, Any]:
    """Return the patterns of each split: written as text, as a list, as objects, or by split."""
    if isinstance(files, list) and all(isinstance(item, Mapping) and {"split", "path"} <= set(item) for item in files):
        files = {str(item["split"]): item["path"] for item in files}
    by_split: Mapping[str, Any] = files if isinstance(files, Mapping) else {"train": files}
    for patterns in by_split.values():
        listed = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(listed, list) or not all(isinstance(pattern, str) for pattern in listed):
            raise ValueError(f"{where}: data_files are {patterns!r:.80}; write patterns of files by split")
    return by_split


def _files_of_card(source: RowSource, configs: Mapping[str, Any]) -> list[Path]:
    usual = [name for name, config in configs.items() if config["default"]] or [
        name for name in configs if name == "default"
    ]
    name = source.config or (list(configs)[0] if len(configs) == 1 else "".join(usual[:1]))
    if name not in configs:
        raise ValueError(_choose("config", source.config, list(configs), source.path))
    patterns = _chosen_split(source, configs[name]["files"])
    files = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files += sorted(map(Path, glob(str(_inside(source.path, pattern)), recursive=True)))  # noqa: PTH207  # as above
    return [file for file in files if kind_of(file) in READERS]


def _chosen_split(source: RowSource, splits: Mapping[str, Any]) -> Any:
    """Return the entry of the split that the source names, of `train`, or of the only one."""
    wanted = source.split or ("train" if "train" in splits else "")
    if not wanted and len(splits) == 1:
        return next(iter(splits.values()))
    if wanted not in splits:
        raise ValueError(_choose("split", source.split, list(splits), source.path))
    return splits[wanted]


def _choose(key: str, found: str, known: list[str], path: Path) -> str:
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    if found:
        return f"{path} has no {key} {found!r}{nearest(found, known)} (known: {shown})"
    return f"{path} has several {key}s; choose one with `{key}`: {shown}"


def _data_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if not hidden and path.name not in _NOTES and kind_of(path) in READERS and path.is_file():
            yield path


def _files_by_name(source: RowSource) -> list[Path]:
    """Return the files whose names say that they are of the config and the split."""
    folder = source.path
    source = replace(source, split=_MEANING.get(source.split, source.split))
    places = {path: path.relative_to(folder) for path in _data_files(folder)}
    configs = {path: _config_of(place) for path, place in places.items()}
    names = sorted({name for name in configs.values() if name})
    if source.config and source.config not in names:
        raise ValueError(_choose("config", source.config, names, folder) if names else f"{folder} has no configs")
    if not source.config and len(names) > 1:
        raise ValueError(_choose("config", "", names, folder))
    by_split: dict[str, list[Path]] = {}
    for path, place in places.items():
        if not source.config or configs[path] == source.config:
            by_split.setdefault(_split_of(place), []).append(path)
    splits = {name: files for name, files in by_split.items() if name} or by_split
    chosen = {**by_split, **splits} if source.split else splits
    files: list[Path] = _chosen_split(source, chosen)
    kinds = sorted({kind_of(path) for path in files})
    if len(kinds) > 1:
        raise ValueError(f"{folder} contains rows of several kinds ({', '.join(kinds)}); name a file or a pattern")
    return files


def _config_of(place: Path) -> str:
    first = place.parts[0] if len(place.parts) > 1 else ""
    return "" if first == "data" or _SPLIT.search(first) else first


def _split_of(place: Path) -> str:
    found = _SPLIT.findall(place.as_posix().lower())
    return _MEANING.get(found[-1], found[-1]) if found else ""

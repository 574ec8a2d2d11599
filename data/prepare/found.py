"""Recognises a user's file or folder as a source of `data:`, and holds a part of it out. No torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.format.tar import ShardError, group_members, walk_tar
from data.rows.containers import kind_of
from data.rows.convert import convert_rows
from data.rows.files import RowSource, count_source, is_rows, read_source
from data.rows.members import type_of

ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".zip")
PLAIN = (".jsonl", ".json")
"""Files of rows that can be parted into two of the same kind."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
TRAINS = ("train", "training")
HELD_OUT = ("held-out", "heldout", "val", "valid", "validation", "dev", "eval", "test")
HELD_OUT_SHARE = 0.05
MOST_ROWS = 500
"""Rows above which no more are held out: each evaluation reads all of them."""
FEWEST_ROWS = 20
"""Rows below which none are held out."""
FEWEST_SHARDS = 10
"""Shards below which none is held out: one would be more than a tenth of the data."""
QUICK_BYTES = 1 << 28
"""Bytes up to which rows are read and headers of shards counted: about a second."""
_ROW = '{"image": "images/1.png", "conversations": [{"from": "human", "value": "<image>What is it?"}, ...]}'


@dataclass(frozen=True, kw_only=True)
class UserData:
    """A source to train on with its number of samples, and one to evaluate on, if there is one."""

    train: str
    held_out: str = ""
    how: str = ""
    """A sentence that names the held-out part, or the reason why there is none."""
    samples: int | None = None
    """None if counting them would take long."""


def find_data(path: Path) -> UserData:
    """Recognise a file or a folder as a source; if it is none, raise a ValueError that says what to do."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    if path.is_file():
        return _file(path)
    if shards := sorted(path.glob("*.tar")):
        return _shards(shards, path)
    rows = sorted(file for file in path.iterdir() if file.suffix in ROWS and not file.name.startswith("."))
    rows = [file for file in rows if not any(file in _sides(whole).values() for whole in rows)]
    trains = [file for file in rows if file.stem in TRAINS] or [file for file in rows if file.stem not in HELD_OUT]
    if not trains and is_rows(str(path)):  # in folders of it, as hubs keep them
        return _file(path)
    if len(trains) > 1:
        names = ", ".join(file.name for file in trains[:5])
        raise ValueError(f"{path} contains several files of rows ({names}): name the one to train on")
    if not trains:
        raise ValueError(_nothing(path))
    found = _file(trains[0])
    others = [file for file in rows if file.stem in HELD_OUT]
    if not others:
        return found
    how = f"{others[0]} is there, so it is the evaluation source"
    return UserData(train=found.train, held_out=str(others[0]), how=how, samples=found.samples)


def _nothing(folder: Path) -> str:
    """Say what a folder without shards and rows lacks."""
    images = sum(file.suffix.lower() in IMAGES for file in folder.rglob("*"))
    if not images:
        return (
            f"{folder} contains no shards (.tar), no file of rows ({', '.join(ROWS)}) and no images. "
            f"docs/data-format.md shows what rows look like"
        )
    return (
        f"{folder} holds {images} image{'s' if images > 1 else ''}, but no file that says what to answer. Write "
        f"{folder / 'train.jsonl'} with a row for each, as {_ROW}"
    )


def _file(path: Path) -> UserData:
    if path.suffix == ".tar":
        return _shards([path], path)
    if not is_rows(str(path)):
        raise ValueError(
            f"{path} is neither a tar of samples nor a file of rows ({', '.join(ROWS)}). Write its rows as a .jsonl, "
            f"one object a line, and look at what `moetune shards build ROWS.jsonl --out shards` says of them"
        )
    source = RowSource(path=path)
    number, row, _ = next(read_source(source), (0, None, path))
    if not number:
        raise ValueError(f"{path} contains no row")
    try:
        if isinstance(row, ValueError):
            raise row
        convert_rows(row)
    except ValueError as error:
        raise ValueError(
            f"{path}, row {number}: {error}. A row looks like {_ROW}; docs/data-format.md has every kind. "
            f"`moetune shards build {path} --out shards` lists all rows that it refuses"
        ) from error
    if kind_of(path) not in PLAIN or path.suffix not in PLAIN:
        how = "none is held out: name another split or file in eval.sources, or use `moetune shards split`"
        return UserData(train=str(path), how=how, samples=count_source(source) or None)
    if path.stat().st_size > QUICK_BYTES:
        how = "none is held out: splitting so large a file takes `moetune shards build` and `moetune shards split`"
        return UserData(train=str(path), how=how)
    return UserData(train=str(path), samples=sum(1 for _ in read_source(source)))


def _shards(shards: list[Path], path: Path) -> UserData:
    try:
        first = next(group_members(shards[0], walk_tar(shards[0])), None)
    except ShardError as error:
        raise ValueError(f"{error}. `moetune shards check {path}` looks at all of them") from error
    if first is None or not any(map(type_of, first.names)):
        names = "no sample" if first is None else f"{', '.join(first.names)} for {first.key}, and nothing that is read"
        raise ValueError(
            f"{shards[0]} contains {names}. A sample of a shard is one json record with its media, or media with a "
            f"caption (docs/data-format.md): write rows (*.jsonl) that name the media, and "
            f"`moetune shards build ROWS.jsonl --out shards` makes such shards"
        )
    if sum(shard.stat().st_size for shard in shards) > QUICK_BYTES:
        return UserData(train=str(path))
    return UserData(train=str(path), samples=sum(1 for shard in shards for _ in group_members(shard, walk_tar(shard))))


def hold_out(data: UserData) -> UserData:
    """Hold a part of the source out, where nothing is yet: the last of many shards, or rows, in files beside it."""
    if data.held_out or data.how:
        return data
    path = Path(data.train)
    return _last_shard(data, path) if path.is_dir() or path.suffix == ".tar" else _some_rows(data, path)


def _last_shard(data: UserData, folder: Path) -> UserData:
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else [folder]
    if len(shards) < FEWEST_SHARDS:
        how = "none is held out: `moetune shards split` parts so few shards, and keeps what belongs together"
        return UserData(train=data.train, samples=data.samples, how=how)
    *first, last = shards
    how = f"{last.name}, the last of {len(shards)} shards, is held out; samples of one group may lie on both sides"
    return UserData(
        train=f"{folder}/{_pattern([shard.name for shard in first])}", held_out=str(last), how=how, samples=data.samples
    )


def _pattern(names: list[str]) -> str:
    """Return a pattern of braces for these names: a range where they are numbered without a gap."""
    parts = [match.groups() for name in names if (match := re.fullmatch(r"(.*?)(\d+)(\D*)", name))]
    if len(parts) == len(names):
        (before, first, after), (_, last, _) = parts[0], parts[-1]
        numbered = [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
        if numbered == names:
            return f"{before}{{{first}..{last}}}{after}"
    return f"{{{','.join(names)}}}"


def _some_rows(data: UserData, path: Path) -> UserData:
    """Copy the rows into two files; those that share their media, or name a group, stay together."""
    groups: dict[str, list[Any]] = {}
    for _, row, _ in read_source(RowSource(path=path)):
        if not isinstance(row, ValueError):
            groups.setdefault(_group(row), []).append(row)
    count = sum(map(len, groups.values()))
    if count < FEWEST_ROWS or len(groups) < 2:
        how = f"none is held out of {count} row{'s' if count != 1 else ''}: name others in eval.sources"
        return UserData(train=data.train, samples=data.samples, how=how)
    held: set[str] = set()
    rows_held = 0
    for group in sorted(groups, key=lambda group: blake2b(group.encode(), digest_size=8).digest()):
        if rows_held < min(MOST_ROWS, HELD_OUT_SHARE * count):
            held.add(group)
            rows_held += len(groups[group])
    files = _sides(path)
    parts: dict[str, list[Any]] = {side: [] for side in files}
    for group, rows in groups.items():
        parts["held-out" if group in held else "train"] += rows
    for side, file in files.items():
        _write_new(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in parts[side]))
    how = (
        f"{len(parts['held-out'])} of {count} rows are held out, in {files['held-out']}; rows that share media or "
        f"`group` stay together"
    )
    return UserData(train=str(files["train"]), held_out=str(files["held-out"]), how=how, samples=len(parts["train"]))


def _sides(path: Path) -> dict[str, Path]:
    """Return the files into which the rows of a file are parted."""
    return {side: path.with_name(f"{path.stem}.{side}.jsonl") for side in ("train", "held-out")}


def _group(row: Any) -> str:
    """Return what rows must have in common to stay on one side: a group, else the first image or video, else all."""
    if not isinstance(row, Mapping):
        return json.dumps(row)
    keys = ("group", "image", "images", "video", "videos", "id")
    value = next((row[key] for key in keys if row.get(key)), row)
    return json.dumps(value[0] if isinstance(value, list) else value, sort_keys=True)


def _write_new(file: Path, text: str) -> None:
    """Write a file that is not there; one with this very text may stay."""
    if file.exists():
        if file.read_text(encoding="utf-8") == text:
            return
        raise ValueError(f"{file} is there already, with other rows. Move it away, or name it with --data")
    file.write_text(text, encoding="utf-8")

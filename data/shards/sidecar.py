"""Files beside a shard: arrays, and notes as JSON. Each carries a checksum of itself and is written as a whole.

A file that fails its checksum, or has none as an older moetune wrote it, counts as missing and is made again. No torch.
"""

import io
import json
import os
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data.format.record import load_json
from data.format.tar import ShardError
from data.stores.remote import remote_of

_HEAD = b"moetune sidecar 1 "
_MOST_MEMBERS = 32

Arrays = dict[str, np.ndarray[Any, Any]]


def sidecar(shard: Path, suffix: str, cache_dir: Path | None) -> Path:
    """Return a path beside the shard, or in the cache folder under a name made from the shard's path."""
    if cache_dir is None or remote_of(shard) is not None:
        return shard.with_name(shard.name + suffix)
    place = blake2b(str(shard.absolute()).encode(), digest_size=8).hexdigest()
    return cache_dir / f"{shard.name}-{place}{suffix}"


def write_whole(path: Path, data: bytes) -> None:
    """Write beside `path` and rename, so that readers see the complete file or none; an OSError names the path."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays, without pickles."""
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    body = packed.getvalue()
    try:
        write_whole(path, _HEAD + _digest(body).encode() + b"\n" + body)
    except OSError as error:
        hint = "set data.cache_dir (or --cache-dir) to a folder that can be written"
        raise ShardError(path, f"cannot write the index: {error.strerror}; {hint}") from error


def read_arrays(path: Path) -> Arrays | None:
    """Read arrays; None if the file is missing, or not written by us."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head, _, body = data.partition(b"\n")
    if head != _HEAD + _digest(body).encode():
        return None
    return _unpack(body)


def _unpack(body: bytes) -> Arrays | None:
    """Return the arrays of the archive, or None if it is compressed and may need more memory than it is long."""
    try:
        members = zipfile.ZipFile(io.BytesIO(body)).infolist()
        if len(members) > _MOST_MEMBERS or sum(member.file_size for member in members) > len(body):
            return None
        with np.load(io.BytesIO(body), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # noqa: BLE001  # the two readers of archives raise a dozen kinds; it is made again
        return None


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write a JSON object with its checksum."""
    text = json.dumps({"checksum": _digest(json.dumps(note).encode()), **note})
    write_whole(path, text.encode())


def read_note(path: Path) -> dict[str, Any] | None:
    """Read the object, without its checksum; None if the file is missing, or not written by us."""
    try:
        note = load_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(note, dict) or note.pop("checksum", None) != _digest(json.dumps(note).encode()):
        return None
    return note


def note_of(shard: Path) -> Path:
    """Return the path of a build's note of one of its shards: `written`, `rejects`, `ignored`."""
    return shard.with_name(f".{shard.name}.json")


def missing_shards(folder: Path) -> list[str]:
    """Return the names of shards that a build noted in this folder and that are gone."""
    notes = sorted(folder.glob(".*.tar.json"))
    gone = [note for note in notes if not (folder / note.name[1 : -len(".json")]).exists()]
    return [note.name[1 : -len(".json")] for note in gone if (read_note(note) or {}).get("written")]


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()

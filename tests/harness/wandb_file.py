"""Read the records of an offline W&B run: its file is a LevelDB log of protocol buffers, after a 7-byte header."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def _payloads(data: bytes) -> list[bytes]:
    whole, part, at = [], b"", 7
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # the rest of the block is too short for a header
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or its last piece
            whole.append(part)
            part = b""
    return whole


def records(folder: Path) -> list[Any]:
    """Return all records in an offline run's folder."""
    (file,) = folder.glob("*.wandb")
    found = []
    for payload in _payloads(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        found.append(record)
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the logged values, with one entry per call."""
    rows = [record.history for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return [
        {".".join([item.key, *item.nested_key]).strip("."): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]

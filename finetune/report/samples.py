"""Samples of a run's first step with their pictures, and the model's answers before the first step and at the end."""

import io
from base64 import b64encode
from pathlib import Path
from typing import Any

from PIL import Image

from data.format.printable import printable
from finetune.report.files import Record, RunFiles

SIDE = 360
"""Pixels of the longer side of a picture on the page."""
MOST_CHARACTERS = 800
"""The most characters of a question or an answer that are shown."""
MOST_ANSWERS = 60
"""The most questions whose answers are shown."""
MOST_SAMPLES = 24
"""The most samples that are shown."""


def samples(files: RunFiles, *, picture_bytes: int) -> list[dict[str, Any]]:
    """Return the recorded samples with as many of their pictures as fit into `picture_bytes`."""
    shown, left = [], picture_bytes
    for record in files.samples[:MOST_SAMPLES]:
        pictures = []
        names = record.get("pictures")
        for name in names if isinstance(names, list) else []:
            address = _picture(files.folder / "media" / Path(str(name)).name)
            if address and len(address) <= left:
                left -= len(address)
                pictures.append(address)
        parts = record.get("parts")
        shown.append(
            {
                "key": text_of(record.get("key")),
                "tokens": record.get("tokens"),
                "supervised": record.get("supervised"),
                "parts": [
                    [printable(str(part[0])), bool(part[1])]
                    for part in (parts if isinstance(parts, list) else [])
                    if isinstance(part, list) and len(part) == 2
                ],
                "pictures": pictures,
            }
        )
    return shown


def _picture(path: Path) -> str:
    """Return a picture as an address that holds all of it; "" if it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def answers(files: RunFiles) -> dict[str, Any] | None:
    """Return the questions of eval.answers with the first and the last answers; None if none were asked."""
    asked = [record for record in files.predictions if isinstance(record.get("rows"), list)]
    if not asked:
        return None
    first, last = asked[0], asked[-1]
    after = {_question(row): row for row in last["rows"] if isinstance(row, dict)}
    rows = [
        {
            "source": text_of(row.get("source")),
            "key": text_of(row.get("key")),
            "question": text_of(row.get("question")),
            "wanted": text_of(row.get("wanted")),
            "before": _answer(row),
            "after": _answer(after.get(_question(row), {})),
        }
        for row in first["rows"][:MOST_ANSWERS]
        if isinstance(row, dict)
    ]
    return {"first": first["step"], "last": last["step"], "rows": rows}


def _question(row: Record) -> tuple[str, str]:
    return str(row.get("source")), str(row.get("key"))


def _answer(row: Record) -> str:
    return text_of(row.get("answer")) + ("" if row.get("finished", True) else " ...")


def text_of(value: object) -> str:
    """Return a text of data for the page: shortened, and with control characters as numbers."""
    text = "" if value is None else printable(str(value))
    return (
        text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ... {len(text) - MOST_CHARACTERS:,} more"
    )

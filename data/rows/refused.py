"""Refusals of rows that cannot be honoured, by name and with the reason."""

from collections.abc import Mapping
from typing import Any

from data.format.fields import BadField

AUDIO = ("audio", "audios", "audio_path", "audio_paths", "sound", "speech", "waveform")
_AUDIO_PARTS = ("audio", "audio_url", "input_audio")
_PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images")
_DICOM = (".dcm", ".dicom")
_MARK_AT = 128
"""Where a DICOM file has its mark."""


def refuse(row: Mapping[str, Any]) -> None:
    """Raise BadField for a row whose meaning would be lost."""
    for name in AUDIO:
        if row.get(name):
            raise BadField(
                name, "is audio, which this model cannot hear. Remove the row, or write what is said as text"
            )
    for name in _PREFERENCES:
        if row.get(name) is not None:
            raise BadField(
                name,
                "belongs to a pair of a better and a worse answer, and training here learns single answers. Build rows "
                "of the better answers: messages, or prompt and completion",
            )
    if row.get("completion") is not None and isinstance(row.get("label"), bool):
        raise BadField("label", "says whether the completion is liked, which is another objective. Keep the liked rows")


def refuse_part(part: Mapping[str, Any], where: str) -> None:
    """Raise BadField for a part of a message that cannot be shown to the model."""
    if part.get("type") in _AUDIO_PARTS:
        raise BadField(where, "is audio, which this model cannot hear. Remove the row, or write what is said as text")


def refuse_dicom(where: str, name: str, data: bytes = b"") -> None:
    """Raise BadField for a DICOM file, by its name or its first bytes."""
    if name.lower().endswith(_DICOM) or data[_MARK_AT : _MARK_AT + 4] == b"DICM":
        raise BadField(
            where,
            "is a DICOM file: its pixels need a window and a level that only you can choose, and it names the patient. "
            "Export PNG files, and name those",
        )

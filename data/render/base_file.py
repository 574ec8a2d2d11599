"""Reads JSON files of a base model; errors name the file."""

from pathlib import Path

from data.format.fields import Fields
from data.format.record import load_json


def read_object(path: Path) -> Fields:
    """Return the JSON object in a file."""
    try:
        value = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Copy it from the release the weights came from") from error
    fields = Fields(Fields.take_object(value, str(path)), "")
    fields.where = f"{path}: "
    return fields

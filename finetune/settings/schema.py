"""The JSON Schema of recipes, with which editors complete and check them. Loads no torch.

It describes a file: a value may also be `???` or contain `${...}`, and a section may be empty. Rules that depend on
other keys, on the base or on the ranks are left to `moetune check`.
"""

from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finetune.config import RunConfig
from finetune.settings.reference import NAME, Key, find
from finetune.settings.typed import element_of

SCHEMA = "recipe.schema.json"
"""Name of the schema's file in the folder of the shipped recipes."""
_OPEN = {"type": "string", "pattern": r"^\?\?\?$|\$\{"}
"""A value that the recipe leaves to its user, or interpolates."""
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}


def schema_file() -> Path:
    """Return the path of the schema that comes with the package."""
    return Path(str(files("configs") / SCHEMA))


def editor_line(schema: str) -> str:
    """Return the first line of a recipe, with which editors find the schema."""
    return f"# yaml-language-server: $schema={schema}"


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe."""
    schema = _section(RunConfig, "")
    base = {"type": "string", "description": "The recipe that this one builds on: a file, or a shipped recipe's name."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "moetune recipe",
        **schema,
        "properties": {"base": base, **schema["properties"]},
    }


def _section(schema: Any, dotted: str) -> dict[str, Any]:
    hints = get_type_hints(schema)
    properties = {
        field.name: _property(f"{dotted}.{field.name}" if dotted else field.name, hints[field.name], field.metadata)
        for field in fields(schema)
    }
    section = find(dotted) if dotted else None
    description = {"description": section.text} if section is not None and not isinstance(section, Key) else {}
    return {**description, "type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _property(dotted: str, hint: Any, metadata: Any) -> dict[str, Any]:
    if is_dataclass(hint):
        return _section(hint, dotted)
    if (element := element_of(hint)) is not None:
        entry = _section(element, f"{dotted}.{NAME}")
        return {"type": ["object", "null"], "propertyNames": {"pattern": "^[\\w-]+$"}, "additionalProperties": entry}
    key = find(dotted)
    assert isinstance(key, Key)
    forms = [_form(one) for one in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))]
    forms += [{"const": "auto"}] if "auto" in metadata else []
    forms += [_OPEN] if {"type": "string"} not in forms else []
    text = f"{key.meaning}\n\nChange: {key.change}" + (f"\n\nWith: {key.related}" if key.related else "")
    return {"description": text, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}


def _form(hint: Any) -> dict[str, Any]:
    """Return the schema of a value; `off` also allows false, as YAML 1.1 reads a bare off."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": [*args, *([False] if "off" in args else [])]}
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return {"type": "array", "items": _form(args[0])}
    if origin is tuple:
        return {"type": "array", "items": _form(args[0]), "minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        return {"type": "object", **({} if args[1] is Any else {"additionalProperties": _form(args[1])})}
    return {"type": _TYPES[hint]}

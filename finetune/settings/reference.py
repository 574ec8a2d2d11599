"""Reads the reference of the configuration: every key with its type, default and explanation. Loads no torch.

The string below a field explains its key to users:

    \"\"\"The meaning in one or two sentences, with all allowed values.

    Change: when and why.
    With: the keys that it interacts with, and how.
    \"\"\"

Python drops such strings, so they are read from the source files. A subclass inherits the texts of its fields.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from finetune.config import RunConfig
from finetune.settings.typed import describe, element_of

NAME = "<name>"
"""Placeholder in a dotted key for a name that users choose."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key. `owner` names the class and field that explain it, which several keys may share."""

    dotted: str
    hint: Any
    type: str
    default: str | None
    meaning: str
    change: str
    related: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section with its own keys; sections inside it are listed separately."""

    dotted: str
    text: str
    keys: tuple[Key, ...]

    @property
    def is_top(self) -> bool:
        """Return whether the section is not inside another one."""
        return "." not in self.dotted.removesuffix(f".{NAME}")


@cache
def sections() -> tuple[Section, ...]:
    """Return every section in the order of the configuration, each followed by the sections inside it."""
    _, *rest = _walk(RunConfig, "", "", RunConfig())
    return tuple(rest)


def keys() -> dict[str, Key]:
    """Return every key by its dotted name."""
    return {key.dotted: key for section in sections() for key in section.keys}


def find(dotted: str) -> Section | Key | None:
    """Return the section or key of a dotted name; names that users choose may be left out or placeholders."""
    known: dict[str, Section | Key] = {section.dotted: section for section in sections()} | dict(keys())
    known |= {section.dotted.removesuffix(f".{NAME}"): section for section in sections()}
    return known.get(dotted) or next((known[name] for name in known if _matches(name, dotted)), None)


def named(last: str) -> list[str]:
    """Return the dotted names of all keys and sections that end with this word."""
    known = [section.dotted for section in sections()] + list(keys())
    return [dotted for dotted in known if dotted.removesuffix(f".{NAME}").rpartition(".")[2] == last]


def first_sentence(text: str) -> str:
    """Return the first sentence of a text."""
    return text.partition(". ")[0].rstrip(".")


def _walk(schema: Any, dotted: str, text: str, values: Any) -> Iterator[Section]:
    """Yield a section and all sections inside it; `values` holds its defaults, or None below a user's name."""
    hints, texts = get_type_hints(schema), _texts(schema)
    own: list[Key] = []
    inside: list[Iterator[Section]] = []
    for field in fields(schema):
        name, hint = f"{dotted}.{field.name}" if dotted else field.name, hints[field.name]
        value = _default(field) if values is None else getattr(values, field.name)
        written, owner = texts.get(field.name, ("", ""))
        if is_dataclass(hint):
            inside.append(_walk(hint, name, _joined(written or inspect.getdoc(hint) or ""), value))
        elif (element := element_of(hint)) is not None:
            inside.append(_walk(element, f"{name}.{NAME}", _joined(inspect.getdoc(element) or ""), None))
        else:
            own.append(_key(name, hint, field, value, written, owner))
    yield Section(dotted=dotted, text=text, keys=tuple(own))
    for sections_inside in inside:
        yield from sections_inside


def _key(dotted: str, hint: Any, field: "Field[Any]", value: Any, written: str, owner: str) -> Key:
    meaning, change, related = (_joined(part) for part in _parts(written))
    return Key(
        dotted=dotted,
        hint=hint,
        type=describe(hint) + (", or auto" if "auto" in field.metadata else ""),
        default=None if value is MISSING else _as_yaml(value),
        meaning=meaning,
        change=change,
        related=related,
        owner=owner,
    )


def _parts(written: str) -> tuple[str, str, str]:
    """Split the text of a key into its meaning, `Change:` and `With:`; missing parts are empty."""
    meaning, *rest = re.split(r"(?m)^(Change|With): ", written)
    labelled = dict(zip(rest[::2], rest[1::2], strict=True))
    return meaning, labelled.get("Change", ""), labelled.get("With", "")


def _joined(text: str) -> str:
    return " ".join(text.split())


def _texts(schema: Any) -> dict[str, tuple[str, str]]:
    """Return the string below each field, with the class and field that own it."""
    texts: dict[str, tuple[str, str]] = {}
    for part in reversed(schema.__mro__[:-1]):
        written = _written(part.__module__).get(part.__name__, {})
        texts |= {name: (text, f"{part.__name__}.{name}") for name, text in written.items()}
    return texts


@cache
def _written(module: str) -> Mapping[str, Mapping[str, str]]:
    """Return class -> field -> the string below it, from a module's source."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_below_fields(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _below_fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            yield field.target.id, inspect.cleandoc(ast.literal_eval(text.value))


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _as_yaml(value: Any) -> str:
    """Return a default as it is written in a recipe."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return str(value) if value != "" else '""'


def _matches(known: str, asked: str) -> bool:
    """Return whether a dotted name matches; a placeholder on either side matches any word."""
    words, other = known.split("."), asked.split(".")
    pairs = zip(words, other, strict=False)
    return len(words) == len(other) and all(a in (b, NAME) or re.fullmatch("<[a-z]+>", b) for a, b in pairs)

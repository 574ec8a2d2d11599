"""Checks plain mappings against dataclasses, value by value, so that every problem is found with its dotted path.

OmegaConf checks the type of single values; alone it would stop at the first bad one and lose paths inside containers.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.settings.problems import Problem, did_you_mean

MUST_BE_SET = "???"  # OmegaConf's marker for a value that a recipe leaves to its user
Schema = TypeVar("Schema")


class TypedTree(Generic[Schema]):
    """The values accepted so far on top of a dataclass's defaults, their sources, and the problems found."""

    def __init__(self, schema: type[Schema]) -> None:
        self.schema = schema
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.problems: list[Problem] = []

    def report(self, key: str, found: Any, allowed: str, remedy: str, source: str) -> None:
        """Record one problem."""
        self.problems.append(Problem(key=key, found=found, allowed=allowed, remedy=remedy, source=source))

    def take(self, tree: Mapping[Any, Any], source: str) -> None:
        """Put a tree of values on top of those accepted so far; report and leave out those that do not fit."""
        self._take_section(tree, self.schema, "", source)

    def finish(self) -> Schema:
        """Return the dataclass; report values that cannot be resolved or were never set, and use their defaults."""
        merged = OmegaConf.merge(OmegaConf.structured(self.schema), self.values)
        raw = OmegaConf.to_container(merged, resolve=False)
        assert isinstance(raw, dict)
        for key, value in leaves(raw).items():
            if value == MUST_BE_SET:
                if not any(related(problem.key, key) for problem in self.problems):
                    self.report(key, None, "it must be set", f"Add {key}=...", "")
                self.drop(key.rpartition(".")[0])  # the entry is useless without it
            elif "${" in str(value):
                try:
                    OmegaConf.select(merged, key)
                except OmegaConfBaseException as error:
                    reason = str(error).splitlines()[0]
                    self.report(key, value, f"it cannot be resolved: {reason}", "Fix the ${...}", self.sources[key])
                    self.drop(key)
        self._drop_entries_that_lack_a_value()
        filled = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(self.schema), self.values))
        assert isinstance(filled, self.schema)
        return filled

    def _drop_entries_that_lack_a_value(self) -> None:
        """Drop entries that lack a required value, which has been reported."""
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(self.schema), self.values), resolve=False)
        assert isinstance(merged, dict)
        for key, value in leaves(merged).items():
            if value == MUST_BE_SET:
                self.drop(key.rpartition(".")[0])

    def _take_section(self, tree: Any, schema: Any, path: str, source: str) -> None:
        if not isinstance(tree, Mapping):
            keys = ", ".join(field.name for field in fields(schema)) or "none yet"
            self.report(path, tree, f"it must be a section, with the keys: {keys}", f"Write {path}.<key>", source)
            return
        hints = get_type_hints(schema)
        for key, value in tree.items():
            dotted = f"{path}.{key}" if path else str(key)
            if key not in hints:
                self._report_unknown(str(key), value, dotted, list(hints), source)
            elif is_dataclass(hints[key]):
                self._take_section({} if value is None else value, hints[key], dotted, source)
            elif element_of(hints[key]) is not None:
                self._take_entries({} if value is None else value, element_of(hints[key]), dotted, source)
            else:
                self._take_value(key, value, hints[key], schema, dotted, source)

    def _take_entries(self, tree: Any, element: Any, path: str, source: str) -> None:
        if not isinstance(tree, Mapping):
            self.report(path, tree, "it must hold entries by name", f"Write {path}.<name>.<key>", source)
            return
        for name, value in tree.items():
            dotted = f"{path}.{name}"
            if not str(name).replace("-", "").replace("_", "").isalnum():
                self.report(dotted, value, "a name may have only letters, digits, - and _", "Rename it", source)
            else:
                _place(self.values, dotted, {}, keep=True)
                self._take_section({} if value is None else value, element, dotted, source)

    def _take_value(self, key: str, value: Any, hint: Any, schema: Any, dotted: str, source: str) -> None:
        if value == MUST_BE_SET:
            self.report(dotted, value, "it must be set: the recipe leaves it to you", f"Add {dotted}=...", source)
            return
        if value is False and "off" in get_args(hint):
            value = "off"  # YAML 1.1 reads a bare off as false
        field = next(field for field in fields(schema) if field.name == key)
        if value is None and field.default == "":
            value = ""  # null unsets a text, such as the model.family of a base recipe
        auto = field.metadata.get("auto")
        if auto is not None:  # internal stand-in for auto; users must write auto
            if value == auto:
                self.report(dotted, value, f"it must be at least {auto + 1}, or auto", f"Set {dotted}=auto", source)
                return
            value = auto if value == "auto" else value
        if not _fits(key, value, hint, schema):
            self.report(dotted, value, f"it must be {describe(hint)}", f"Set another {dotted}", source)
            return
        # this value replaces a bad one of a lower layer
        self.problems = [problem for problem in self.problems if problem.key != dotted]
        _place(self.values, dotted, value)
        self.sources[dotted] = source

    def _report_unknown(self, key: str, value: Any, dotted: str, known: list[str], source: str) -> None:
        nested = "." in key and key.partition(".")[0] in known
        parent = dotted.removesuffix(key)
        remedy = "Nest it: a dot separates sections only on the command line" if nested else ""
        if not nested and known:
            remedy = did_you_mean(dotted, [f"{parent}{name}" for name in known])
        self.report(dotted, value, "no such key", remedy or f"Remove it: {parent.rstrip('.')} has no keys yet", source)

    def drop(self, dotted: str) -> None:
        """Drop a value, so that its default is used."""
        *parents, last = dotted.split(".")
        place = self.values
        for parent in parents:
            place = place.get(parent, {})
        place.pop(last, None)


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value, without empty sections."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(leaves(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def related(key: str, other: str) -> bool:
    """Return whether the keys are equal or one is a section around the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def element_of(hint: Any) -> Any:
    """Return the dataclass of a dict of dataclasses, else None."""
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
        return get_args(hint)[1]
    return None


def describe(hint: Any) -> str:
    """Return a description of a type for users."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is list:
        return f"a list, each {describe(args[0])}"
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list, each {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(describe(arg) for arg in args)}"
    if origin is dict:
        return "a mapping"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return words[hint]


def _fits(key: str, value: Any, hint: Any, schema: Any) -> bool:
    if get_origin(hint) is list and isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value):
        return False  # OmegaConf accepts nested containers in a list of plain values
    try:
        OmegaConf.merge(OmegaConf.structured(schema), {key: value})
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError):
        return False
    return True


def _place(tree: dict[str, Any], dotted: str, value: Any, *, keep: bool = False) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if not (keep and last in tree):
        tree[last] = value

"""Writes what is generated: docs/configuration.md, docs/commands.md and the JSON Schema of recipes.

python -m launchers.reference     from the root of the repository, after a change of a key or of a command's arguments
"""

import argparse
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from finetune.settings.reference import NAME, Key, Section, keys, sections
from finetune.settings.schema import SCHEMA, recipe_schema
from launchers.cli import COMMANDS, EXIT_CODES, add_command

ROOT = Path(__file__).parents[1]
_MADE = "<!-- Made by `python -m launchers.reference`; do not edit. -->"
_PART = "<part>"
"""Stands in a dotted key for a word of ours: several keys that share a text."""


def pages() -> dict[str, str]:
    """Return the text of each generated file, by its path from the root."""
    return {
        "docs/configuration.md": configuration_page(),
        "docs/commands.md": commands_page(),
        f"configs/{SCHEMA}": json.dumps(recipe_schema(), indent=1) + "\n",
    }


def configuration_page() -> str:
    """Return the page of all keys."""
    tops = [section for section in sections() if section.is_top]
    lines = [
        _MADE,
        "# Configuration",
        "",
        "A recipe is a YAML file with these sections; `section.key=value` on the command line wins over it. `<name>`",
        "stands for a name that you choose. `moetune explain KEY` prints the entry of a key, and `moetune check`",
        "prints the value of every key in a recipe.",
        "",
        "`base: RECIPE` at the top of a recipe names one that it builds on: a file, or a shipped recipe. A value may",
        "refer to others (`${section.key}`, `${oc.env:VARIABLE}`), or be `???` where the command line must give it.",
        "",
        "Editors with the YAML language server complete and check a recipe that begins with the line that",
        "`moetune explain --schema` prints.",
        "",
        *(f"- [`{top.dotted}`](#{_anchor(top.dotted)}): {top.text}" for top in tops),
    ]
    for top in tops:
        inside = [section for section in sections() if section is top or section.dotted.startswith(f"{top.dotted}.")]
        lines += ["", f"## `{top.dotted}`", "", top.text, *_section_lines(inside)]
    return _linked("\n".join(lines) + "\n")


def _section_lines(inside: list[Section]) -> Iterator[str]:
    """Yield the entries of a section and of those inside it; keys that share a text are one entry."""
    owned: dict[str, list[Key]] = {}
    for section in inside:
        for key in section.keys:
            owned.setdefault(key.owner, []).append(key)
    shared = {owner for owner, group in owned.items() if len(group) > 1}
    parts = [section for section in inside if any(key.owner in shared for key in section.keys)]
    if parts:
        yield from ["", *(f"- `{section.dotted}`: {section.text}" for section in parts)]
    for section in inside:
        if section is not inside[0] and section not in parts:
            yield from ["", f"### `{section.dotted}`", "", section.text]
        for key in section.keys:
            if group := owned.pop(key.owner, None):
                yield from _entry(group)


def _entry(group: list[Key]) -> Iterator[str]:
    key, *others = group
    *before, _, last = key.dotted.split(".")
    dotted = ".".join([*before, _PART, last]) if others else key.dotted
    yield from ["", f"#### `{dotted}`", ""]
    yield f"{key.type[0].upper()}{key.type[1:]}; {_defaults(group)}."
    if others:
        yield f"A key of {', '.join(map(_part, group))}."
    yield from ["", key.meaning, "", f"- **Change**: {key.change}"]
    if key.related:
        yield f"- **With**: {key.related}"


def _defaults(group: list[Key]) -> str:
    """Return the default in words; where it differs within a group, the most frequent one first."""
    by_value: dict[str | None, list[str]] = {}
    for key in group:
        by_value.setdefault(key.default, []).append(_part(key))
    (usual, _), *rest = sorted(by_value.items(), key=lambda item: -len(item[1]))
    if usual is None:
        return "it must be set"
    return "; ".join([f"default `{usual}`", *(f"`{value}` for {', '.join(names)}" for value, names in rest)])


def _part(key: Key) -> str:
    """Return the section of a key that shares its text."""
    return f"`{key.dotted.split('.')[-2]}`"


def _anchor(dotted: str) -> str:
    """Return what a page of GitHub makes of a heading."""
    return re.sub(r"[^\w-]", "", dotted.lower())


def _linked(page: str) -> str:
    """Let each key that is named outside of a heading lead to its entry."""
    headings = set(re.findall(r"^#+ `(.+)`$", page, re.MULTILINE))
    known = {name: name for name in headings}
    known |= {key: re.sub(r"\.[^.]+(\.[^.]+)$", rf".{_PART}\1", key) for key in keys() if key not in headings}
    known |= {name.removesuffix(f".{NAME}"): name for name in headings if name.endswith(NAME)}

    def link(match: re.Match[str]) -> str:
        target = known.get(match[1])
        return f"[`{match[1]}`](#{_anchor(target)})" if target else match[0]

    return "\n".join(
        line if line.startswith("#") else re.sub(r"(?<!\[)`([\w.<>]+)`", link, line) for line in page.split("\n")
    )


def commands_page() -> str:
    """Return the page of all commands."""
    commands = argparse.ArgumentParser(prog="moetune").add_subparsers()
    lines = [
        _MADE,
        "# Commands",
        "",
        "`moetune COMMAND --help` prints the same. A `key=value` is a key of the [configuration](configuration.md).",
        "",
        *(f"- [`{name}`](#moetune-{name}): {summary}" for name, summary in COMMANDS.items()),
        "",
        "| exit code | means |",
        "| --- | --- |",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
        "",
        "Every command takes `--debug`, which shows the traceback of an input error.",
    ]
    for name in COMMANDS:
        parser = add_command(commands, name)
        module = import_module(f"launchers.{name.replace('-', '_')}")
        lines += ["", f"## moetune {name}", "", f"{parser.description}", "", *_parser_lines(parser, "###")]
        lines += ["", "```sh", *(line.removeprefix("  ") for line in module.EXAMPLE.splitlines()), "```"]
        own: Mapping[int, str] = getattr(module, "EXIT_CODES", {})
        lines += [f"\nExit code {code}: {meaning}." for code, meaning in own.items()]
    return "\n".join(lines) + "\n"


def _parser_lines(parser: argparse.ArgumentParser, level: str) -> Iterator[str]:
    actions = [action for action in parser._actions if not {"--help", "--debug"} & {*action.option_strings}]
    inner = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    own = [action for action in actions if action not in inner]
    usage = " ".join([parser.prog, *(["ACTION ..."] if inner else map(_usage, own))])
    yield from ["```text", *textwrap.wrap(usage, 100, subsequent_indent="    ", break_on_hyphens=False), "```"]
    if own:
        yield from ["", *(f"- `{_form(action)}`: {_help(action)}" for action in own)]
    for action in inner:
        about = {choice.dest: choice.help for choice in action._choices_actions}
        for name, sub in action.choices.items():
            yield from [
                "",
                f"{level} {sub.prog}",
                "",
                f"{_sentence(about[name] or '')}",
                "",
                *_parser_lines(sub, level),
            ]


def _usage(action: argparse.Action) -> str:
    many = " ..." if action.nargs == "*" else ""
    needed = action.required and action.nargs != "*"
    return _form(action) if needed else f"[{_form(action)}{many}]"


def _form(action: argparse.Action) -> str:
    """Return an argument as one writes it."""
    values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.metavar or action.dest.upper()
    words = [*action.option_strings[:1], *([str(values)] if action.nargs != 0 else [])]
    return " ".join(words)


def _help(action: argparse.Action) -> str:
    values = {name: value for name, value in vars(action).items() if value is not argparse.SUPPRESS}
    times = "; may be given several times" if isinstance(action, argparse._AppendAction) else ""
    return (action.help or "") % values + times


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


if __name__ == "__main__":
    for path, text in pages().items():
        (ROOT / path).write_text(text)
        print(path)

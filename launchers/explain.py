"""`moetune explain`: explain a configuration key: its meaning, when to change it, and what it interacts with."""

import argparse
import textwrap
from collections.abc import Sequence

from finetune.settings.problems import did_you_mean
from finetune.settings.reference import Key, Section, find, first_sentence, keys, named, sections
from finetune.settings.schema import editor_line, schema_file

EXAMPLE = """\
  moetune explain data.mixture
  moetune explain mixture                             # the last word is enough
  moetune explain data.sources.charts.weight          # a key of one of your sources
  moetune explain parallel                            # the keys of a section, one line each
  moetune explain --schema                            # the first line of a recipe for completion in editors"""

WIDTH = 100
"""Characters per line."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("key", metavar="KEY", nargs="?", help="a key or a section (default: list the sections)")
    parser.add_argument(
        "--schema", action="store_true", help="print the line that makes editors complete and check a recipe"
    )


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    if args.schema:
        print(editor_line(str(schema_file())))
    elif args.key is None:
        print(_table([(section.dotted, section.text) for section in sections() if section.is_top]))
    else:
        print(_explanation(args.key))
    return 0


def _explanation(asked: str) -> str:
    found = find(asked)
    if found is None and len(same := named(asked)) > 1:
        return "\n".join([f"{asked} is the last word of {len(same)} keys:", *(f"  {dotted}" for dotted in same)])
    if found is None and same:
        found = find(same[0])
    if found is None:
        known = [*keys(), *(section.dotted for section in sections())]
        raise ValueError(f"{asked!r} is neither a key nor a section. {did_you_mean(asked, known)}.")
    return _key_text(found) if isinstance(found, Key) else _section_text(found)


def _key_text(key: Key) -> str:
    default = "it must be set" if key.default is None else f"default {key.default}"
    paragraphs = [key.meaning, f"Change: {key.change}", *([f"With: {key.related}"] if key.related else [])]
    return "\n\n".join([f"{key.dotted}: {key.type}; {default}", *(textwrap.fill(text, WIDTH) for text in paragraphs)])


def _section_text(section: Section) -> str:
    rows = [(key.dotted, key.meaning) for key in section.keys]
    rows += [(other.dotted, other.text) for other in sections() if other.dotted.startswith(f"{section.dotted}.")]
    return "\n\n".join([textwrap.fill(f"{section.dotted}: {section.text}", WIDTH), *([_table(rows)] if rows else [])])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    """Return one line per name, with the first sentence of its text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{width}}  {textwrap.shorten(first_sentence(text), WIDTH - width - 2, placeholder=' ...')}"
        for name, text in rows
    )

"""`python -m benchmarks NAME`: measure moetune against stock libraries. See --help.

Exit codes: 0 every floor passed; 1 a floor was missed, or outputs differ; 2 no such benchmark. On GPUs, use
`bash benchmarks/gpu/run.sh`.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.entries import ENTRIES, Entry
from benchmarks.harness.figure import refusal
from benchmarks.harness.machine import surroundings
from benchmarks.harness.measure import OutputsDiffer

OWN = {"cards": "benchmarks.cards.command", "probes": "benchmarks.probes.__main__"}
"""Commands with options and results of their own."""


def main(argv: Sequence[str], *, entries: Sequence[Entry] = ENTRIES) -> int:
    """Run the chosen benchmarks, print each figure, write the records, and return the exit code."""
    if argv and argv[0] in OWN:
        own: int = import_module(OWN[argv[0]]).main(argv[1:])
        return own
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure moetune against stock libraries. Outputs are compared first; a wrong result is refused.",
        epilog="exit codes: 0 every floor passed, 1 a floor missed or outputs differ, 2 wrong name",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME", help="one benchmark")
    what.add_argument("--list", action="store_true", help="list the benchmarks with what they measure")
    what.add_argument("--all", action="store_true", help="run all benchmarks in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to this file, as a JSON array")
    args = parser.parse_args(argv)
    if args.list:
        for entry in entries:
            print(f"{entry.name:<20} {entry.about}")
        print(f"with options of their own: {', '.join(OWN)}")
        return 0
    chosen = [entry for entry in entries if args.all or args.name == entry.name]
    if not chosen:
        print(f"benchmarks: {_unknown(args.name, entries)}", file=sys.stderr)
        return 2
    return _run(chosen, args.json)


def _run(entries: Sequence[Entry], path: Path | None) -> int:
    """Run the benchmarks in turn; the file is written after each, so that a crash keeps the earlier records."""
    records: list[dict[str, object]] = []
    where = surroundings()
    for entry in entries:
        print(f"{entry.name}: {entry.about}", flush=True)
        records += _records(entry, where)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(records, indent=1) + "\n")
    if path is not None:
        print(f"records written to {path}: {len(records)}")
    return 1 if any(record["pass"] is False for record in records) else 0


def _records(entry: Entry, where: Mapping[str, object]) -> list[dict[str, object]]:
    records = []
    try:
        for figure in import_module(entry.module).run():
            print(f"  {figure.line()}", flush=True)
            records.append(figure.record(name=entry.name, surroundings=where))
    except OutputsDiffer as error:
        print(f"{entry.name}: refused, outputs differ: {error}", file=sys.stderr)
        records.append(refusal(name=entry.name, surroundings=where, why=str(error)))
    return records


def _unknown(name: str, entries: Sequence[Entry]) -> str:
    names = [entry.name for entry in entries]
    near = difflib.get_close_matches(name, names, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return f"no benchmark is called {name!r}.{meant} Available are: {', '.join(names)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

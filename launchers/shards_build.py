"""The action `moetune shards build`: its flags, and rows into shards."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.format.printable import count_of, size_of
from launchers.arguments import mapped_columns, positive

EMBEDDED_TWICE = 1_000_000
"""Bytes of repeated media from which on `build` suggests --media reference."""


def build_arguments(build: argparse.ArgumentParser) -> None:
    """Declare the flags of the action."""
    build.add_argument("--config", default="", help="part of a hub-style folder (data.sources.<name>.config)")
    build.add_argument("--split", default="", help="split of a folder (data.sources.<name>.split)")
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    build.add_argument("--name", default="part", help="prefix of the shards' names (default: part)")
    build.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="rows per shard (default 1000)"
    )
    build.add_argument(
        "--media",
        choices=("embed", "reference"),
        default="embed",
        help="copy images and videos into the shards (default), or refer to the files by path",
    )
    build.add_argument(
        "--group", default="", metavar="COLUMN", help="column whose equal values must stay together in a split"
    )
    build.add_argument(
        "--max-rejects", type=int, default=0, metavar="N", help="exit code 3 for more than N refused rows (default 0)"
    )


def build(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], int]:
    """Build the shards; return the answer, lines for people, and how many rows were refused."""
    from data.prepare.build import BuildOptions, build_shards, repeated_bytes
    from data.prepare.copies import REJECTS
    from data.prepare.progress import Progress
    from data.prepare.recognise import recognise
    from data.rows.files import count_source

    options = BuildOptions(
        name=args.name,
        samples_per_shard=args.samples_per_shard,
        media=args.media,
        media_root=str(args.media_root or ""),
        allow_private=args.allow_private_addresses,
        group=args.group,
        map=mapped_columns(args).text,
        config=args.config,
        split=args.split,
    )
    source = options.source(Path(args.path))
    what = recognise(source)
    with Progress(source.path.name, count_source(source)) as progress:
        report = build_shards(source.path, args.out, options, jobs=args.jobs, progress=progress)
    lines = [
        f"{source.path.name}: {count_of(report.rows, 'row')}, recognised as {what}",
        f"{count_of(report.written, 'sample')} in {count_of(len(report.shards), 'shard')} under {args.out}",
    ]
    if report.reused:
        lines.append(f"kept from an earlier build of this file: {count_of(report.reused, 'shard')}")
    if report.rejected:
        lines.append(f"{count_of(report.rejected, 'row')} refused; the reasons are in {args.out / REJECTS}")
    lines += [
        f"column {name!r} of {count_of(rows, 'row')} was not used" for name, rows in sorted(report.ignored.items())
    ]
    repeated = repeated_bytes(report.shards) if args.media == "embed" else 0
    if repeated >= EMBEDDED_TWICE:
        lines.append(
            f"{size_of(repeated)} are copies of media in other samples; with --media reference, samples share the files"
        )
    return asdict(report) | {"repeated_bytes": repeated, "recognised": what}, lines, report.rejected

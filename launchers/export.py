"""`moetune export`: convert an adapter to the form that a server reads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

EXAMPLE = """\
  moetune export runs/mine/adapter exported --format peft                 # vLLM, PEFT
  moetune export runs/mine/adapter exported --format per-expert           # sglang and others: 2-D keys
  moetune export from-elsewhere exported --format peft --base /models/Qwen3-VL-30B-A3B-Instruct"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="an adapter folder: ours, PEFT's, or per expert")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--format", required=True, choices=("peft", "per-expert"), help="form that the reader needs")
    parser.add_argument("--base", type=Path, metavar="DIR", help="base of the adapter, to check its shapes")


def run(args: argparse.Namespace) -> int:
    """Write the folder, read it back, and print a summary."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would search for a GPU, and print so
    from data.format.printable import count_of
    from finetune.adapters.export import export
    from finetune.architecture.shapes import parameter_shapes
    from finetune.files.hubconfig import read_family

    shapes = parameter_shapes(read_family(args.base)) if args.base else None
    done = export(args.adapter, args.out, form=args.format, shapes=shapes)
    for line in done.warnings:
        print(f"note: {line}")
    meaning = "bit for bit the same" if done.exact else "the same except for the rounding noted above"
    print(
        f"wrote {done.folder}: {count_of(done.changes, 'change')} of r {done.r}, scale {done.scale:g}, "
        f"{done.bytes:,} bytes; read back, they are {meaning}. {done.folder / 'README.md'} names the programs that "
        f"read it"
    )
    return 0

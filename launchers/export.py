"""`moetune export`: an adapter in the form that a server reads."""

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
    parser.add_argument("--format", required=True, choices=("peft", "per-expert"), help="what the reader wants")
    parser.add_argument("--base", type=Path, metavar="DIR", help="its base: the adapter is held against its shapes")


def run(args: argparse.Namespace) -> int:
    """Write the folder, read it back, say what it holds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the engine's library would search for a GPU, and say so
    from finetune.adapters.export import export
    from finetune.architecture.shapes import parameter_shapes
    from finetune.files.hubconfig import read_family

    shapes = parameter_shapes(read_family(args.base)) if args.base else None
    done = export(args.adapter, args.out, form=args.format, shapes=shapes)
    for line in done.warnings:
        print(f"note: {line}")
    meaning = "the same changes to the last bit" if done.exact else "the same changes but for the rounding noted"
    print(
        f"wrote {done.folder}: {done.changes} changes of r {done.r}, scale {done.scale:g}, {done.bytes:,} bytes; read "
        f"back, they are {meaning}. {done.folder / 'README.md'} says what reads it"
    )
    return 0

"""`moetune runs`: the runs in a folder, each with its state, step, best metric, base and size."""

import argparse
from pathlib import Path

EXAMPLE = """\
  moetune runs
  moetune runs /data/runs"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs")


def run(args: argparse.Namespace) -> int:
    """Print the runs, the latest first."""
    from finetune.report.listing import run_lines, table

    print("\n".join(table(run_lines(args.folder))))
    return 0

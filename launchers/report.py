"""`moetune report`: everything that a run recorded as one HTML file, for one run or several beside each other."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from launchers.arguments import positive

EXAMPLE = """\
  moetune report runs/mine                     # writes runs/mine/report.html
  moetune report runs/mine runs/other --out compared.html"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run; several are compared")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the folder of the run, or in the working folder",
    )
    parser.add_argument(
        "--watch", action="store_true", help="write it again while a run lives; the page reloads itself"
    )
    parser.add_argument(
        "--seconds", type=positive, metavar="S", default=30, help="with --watch: how often (default 30)"
    )
    parser.add_argument(
        "--png", action="store_true", help="also write pictures for papers, to report/ in each run; needs matplotlib"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report, once or while the runs live, and print its path."""
    from finetune.report.files import read_run_files
    from finetune.report.page import write_report
    from finetune.report.pictures import write_pictures

    out = args.out or (Path("report.html") if len(args.runs) > 1 else None)
    lives = args.watch and _any_lives(args.runs)
    print(write_report(args.runs, out, refresh=args.seconds if lives else 0), flush=True)
    while lives:
        time.sleep(args.seconds)
        lives = _any_lives(args.runs)
        write_report(args.runs, out, refresh=args.seconds if lives else 0)
    if args.png:
        for folder in args.runs:
            for path in write_pictures(read_run_files(folder), folder / "report"):
                print(path)
    return 0


def _any_lives(folders: Sequence[Path]) -> bool:
    from finetune.report.state import state_of

    return any(state_of(folder).word == "running" for folder in folders)

"""`python -m benchmarks.gpu [minutes]`: run every part and write the record; `run.sh` prepares the machine first.

Exit codes: 0 every part passed or had nothing to do, 1 a part failed, 2 wrong arguments.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.gpu import misses
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.runner import run_parts
from benchmarks.gpu.sizes import Sizes, look
from benchmarks.harness.machine import surroundings
from benchmarks.planner.predictions import PATH


def main(argv: Sequence[str], *, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts, print the outcome of each, and compare with the predictions."""
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu/run.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "minutes", nargs="?", type=_minutes, default=10.0, help="time for all parts together (default 10)"
    )
    parser.add_argument("--out", type=Path, default=PATH.parent, metavar="FOLDER", help="folder for record and log")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[part.name for part in parts],
        metavar="PART",
        help="run only these parts",
    )
    args = parser.parse_args(argv)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # else this process would hold GPU memory
        sizes, device = pool.submit(look).result()
    record: dict[str, object] = {
        **surroundings(),
        **device,
        "gpu": sizes.gpu,
        "gpus": sizes.world,
        "sizes": sizes.name,
        "minutes": args.minutes,
        "parts": [],
        "predictions": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{_slug(sizes.gpu)}x{sizes.world}-{_slug(str(record['commit']))}.json"
    chosen = [part for part in parts if not args.only or part.name in args.only]
    outcomes, environment = [], {"DS_ACCELERATOR": sizes.device}
    with path.with_suffix(".log").open("w+") as log:
        log.write(json.dumps({key: record[key] for key in record if key not in ("parts", "predictions")}, indent=1))
        for outcome in run_parts(chosen, sizes, minutes=args.minutes, log=log, environment=environment):
            outcomes.append(outcome)
            reason = f": {outcome['reason']}" if outcome["reason"] else ""
            print(f"{outcome['part']:<16} {outcome['outcome']:<10} {outcome['seconds']:6.1f} s{reason}", flush=True)
            for figure in outcome["figures"]:
                print(f"  {_line(figure)}", flush=True)
            compared = _compare(sizes, [figure for part in outcomes for figure in part["figures"]])
            path.write_text(json.dumps(record | {"parts": outcomes, "predictions": compared}, indent=1) + "\n")
        verdicts = misses.lines(_compare(sizes, [figure for part in outcomes for figure in part["figures"]]))
        print("\n".join(verdicts))
        log.write("\n".join(["", *verdicts, ""]))
    print(f"record: {path}\nlog: {path.with_suffix('.log')}")
    return 1 if any(outcome["outcome"] in ("failed", "timed out") for outcome in outcomes) else 0


def _compare(sizes: Sizes, figures: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    predictions = misses.read(PATH)
    steps = [figure for figure in figures if str(figure["name"]).startswith("gpu-step")]
    return misses.compare(predictions, steps, device=sizes.gpu, visible=sizes.world)


def _line(figure: dict[str, object]) -> str:
    value, beside = figure["value"], ""
    if figure["peer"]:
        beside = f" | {figure['peer']}: {figure['peer_value']:,.4g} | {figure['ratio'] or 0:.2f}x"
    missed = " | NOT REACHED" if figure["pass"] is False else ""
    return f"{figure['metric']}: {value:,.4g} {figure['unit']}{beside}{missed}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"minutes must be above 0 and at most a day, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

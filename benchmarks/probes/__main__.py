"""`python -m benchmarks.probes`: train tiny models, probe them, and write results/probes.json. See --help.

What is recorded already is not trained again, so an interrupted command continues when it is called again. Exit codes:
0 every probe detects its mechanism, 1 one of them misses it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

SEEDS = (0, 1, 2)


def main(argv: Sequence[str]) -> int:
    """Train and probe what is not recorded yet, and print all that is."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # the numbers are of a CPU, wherever they are made
    from benchmarks.probes.cases import CASES
    from benchmarks.probes.detect import close_expert, detect
    from benchmarks.probes.record import LEAST, RESULTS, keep_numbers, read_numbers

    names = [case.probe for case in CASES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__)
    parser.add_argument("--probes", nargs="+", choices=[*names, "balance"], default=[*names, "balance"], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="seeds (default 0 1 2)")
    parser.add_argument("--again", action="store_true", help="train what is recorded as well, and replace it")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where the numbers are kept")
    args = parser.parse_args(argv)
    numbers = read_numbers(args.results)
    if args.again:
        numbers = replace(
            numbers,
            detections=[one for one in numbers.detections if (one.probe, one.seed) not in _pairs(args)],
            dead=[one for one in numbers.dead if ("balance", one.seed) not in _pairs(args)],
        )
    known = {(one.probe, one.seed) for one in numbers.detections} | {("balance", one.seed) for one in numbers.dead}
    cases = {case.probe: case for case in CASES}
    for name, seed in _pairs(args):
        if (name, seed) in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if name == "balance":
                dead = [*numbers.dead, close_expert(seed=seed, folder=Path(folder))]
                numbers = replace(numbers, dead=sorted(dead, key=lambda one: one.seed))
            else:
                found = [*numbers.detections, detect(cases[name], seed=seed, folder=Path(folder))]
                numbers = replace(numbers, detections=sorted(found, key=lambda one: (names.index(one.probe), one.seed)))
        keep_numbers(numbers, args.results)
    for one in numbers.detections:
        print(f"{one.probe}, seed {one.seed}: {one.having:.2f} with, {one.lacking:.2f} without, {one.seconds:.0f} s")
    for closed in numbers.dead:
        print(f"balance, seed {closed.seed}: layer {closed.layer}, expert {closed.expert} closed, {closed.named} named")
    fine = all(one.difference >= LEAST for one in numbers.detections) and all(one.exactly for one in numbers.dead)
    return 0 if fine else 1


def _pairs(args: argparse.Namespace) -> list[tuple[str, int]]:
    return [(name, seed) for name in args.probes for seed in args.seeds]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

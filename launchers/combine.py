"""`moetune combine`: a weighted sum of adapters, experts included."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

EXAMPLE = """\
  moetune combine summed runs/charts/adapter=0.7 runs/screens/adapter=0.3              # exact: ranks add up
  moetune combine summed runs/charts/adapter=0.7 runs/screens/adapter=0.3 --rank 16    # by SVD, its error stated"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="adapter folders, each with its weight")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="the most that a change may have, by SVD")


def run(args: argparse.Namespace) -> int:
    """Write the sum and say how exact it is."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the engine's library would search for a GPU, and say so
    from finetune.adapters.combine import combine

    if args.rank < 0:
        raise ValueError(f"--rank {args.rank}: it must be a number from 1 on, or none for the exact sum")
    done = combine(_weights(args.adapters), args.out, rank=args.rank)
    ranks = sorted(set(done.ranks.values()))
    print(f"wrote {done.folder}: {len(done.ranks)} changes of r {', '.join(map(str, ranks))}, {done.bytes:,} bytes")
    if not done.alike:
        print(
            "note: the adapters were trained with other data.image, data.video or data.chat; the sum keeps none of them"
        )
    if done.exact:
        print("exact: factors lie side by side, tensors held in full are summed, all in float32; its rounding is lost")
        return 0
    print(f"re-ranked: the changes are {done.error:.2%} off the exact sum over all; most in:")
    for name, error in sorted(done.errors.items(), key=lambda item: -item[1])[:5]:
        print(f"  {name}: {error:.2%} off")
    return 0


def _weights(words: list[str]) -> dict[Path, float]:
    weights: dict[Path, float] = {}
    for word in words:
        folder, sign, number = word.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            sign = ""
        if not sign or not folder:
            raise ValueError(f"{word!r} is no ADAPTER=WEIGHT, such as runs/charts/adapter=0.7")
        if Path(folder) in weights:
            raise ValueError(f"{folder} is named twice; give it one weight")
        weights[Path(folder)] = weight
    return weights

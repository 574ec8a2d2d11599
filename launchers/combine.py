"""`moetune combine`: add adapters with weights, experts included."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

EXAMPLE = """\
  moetune combine summed runs/charts/adapter=0.7 runs/screens/adapter=0.3              # exact: ranks add up
  moetune combine summed runs/charts/adapter=0.7 runs/screens/adapter=0.3 --rank 16    # by SVD, prints its error"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="an adapter folder and its weight")
    parser.add_argument(
        "--rank", type=int, default=0, metavar="R", help="reduce changes to at most this rank, by SVD (default: exact)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the sum and print how exact it is."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would search for a GPU, and print so
    from data.format.printable import count_of
    from finetune.adapters.combine import combine

    if args.rank < 0:
        raise ValueError(f"--rank must be at least 1, got {args.rank}. Leave it out for the exact sum")
    done = combine(_weights(args.adapters), args.out, rank=args.rank)
    ranks = sorted(set(done.ranks.values()))
    changes = count_of(len(done.ranks), "change")
    print(f"wrote {done.folder}: {changes} of r {', '.join(map(str, ranks))}, {done.bytes:,} bytes")
    if not done.alike:
        print(
            "note: the adapters differ in data.image, data.video or data.chat of their training; the sum records none"
        )
    if done.exact:
        print("exact: factors are concatenated and full tensors are summed, in float32; only its rounding is lost")
        return 0
    print(f"reduced: all changes together are {done.error:.2%} off the exact sum; the largest errors:")
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
            raise ValueError(f"{word!r} must be ADAPTER=WEIGHT, such as runs/charts/adapter=0.7")
        if Path(folder) in weights:
            raise ValueError(f"{folder} is named twice; give it one weight")
        weights[Path(folder)] = weight
    return weights

"""Checks on rank 0, before it imports torch, everything that would stop the run, unless our launcher has done so.

Rank 0 alone, so that there is one message: the other ranks read the same recipe from the same disks. They import torch
meanwhile, then wait for rank 0 to take the run's folder. When rank 0 ends, its launcher ends them, on every node.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.preflight.start import require_start
from finetune.settings.recipes import decoded_words, load_recipe

USAGE = "torchrun --nproc_per_node N -m finetune.train CONFIG [key=value ...] [--dry-run | --replay FOLDER]"
LOOKED = "MOETUNE_LOOKED"
"""Set by `moetune train`, which has looked, to the id of the torchrun that it starts."""


def rank_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of a rank."""
    parser = argparse.ArgumentParser(usage=USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("config", metavar="CONFIG", nargs="?")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--replay", metavar="FOLDER", type=Path)
    parser.add_argument("--words", type=decoded_words)  # both in one word, where a launcher quotes nothing
    parser.add_argument("--local_rank")  # the deepspeed launcher passes it; the environment has it too
    args = parser.parse_intermixed_args(argv)
    if args.words:
        args.config, *args.overrides = args.words
    if args.config is None:
        parser.error("the following arguments are required: CONFIG")
    return args


def look_first(argv: Sequence[str]) -> None:
    """End rank 0 with code 2 and one message if anything would stop the run; do nothing in other ranks."""
    looked = os.environ.get(LOOKED, "")
    if int(os.environ.get("RANK", "0")) or (looked and looked == os.environ.get("TORCHELASTIC_RUN_ID")):
        return
    args = rank_arguments(argv)
    try:
        config, problems = load_recipe(args.config, args.overrides)
        trains = args.replay is None and not args.dry_run
        lines = require_start(config, problems, ranks=int(os.environ.get("WORLD_SIZE", "1")), trains=trains)
    except ValueError as error:
        sys.stderr.write(f"moetune train: {error}\n")
        sys.exit(2)
    sys.stdout.write("".join(f"{line}\n" for line in lines))

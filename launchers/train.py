"""`moetune train`: start the training loop on this machine's ranks, through torchrun."""

import argparse
import os
import subprocess
import sys

from launchers.check import positive

EXAMPLE = """\
  moetune tiny base
  moetune train tiny-cpu --ranks 2 model.path=base data.sources.general.path=train.jsonl"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
    parser.add_argument("--ranks", type=positive, metavar="N", default=1, help="processes, one a GPU (default 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="checks, shards, memory and one real step; leave nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Hand over to torchrun; its exit code is ours, but for wrong input, which is 2 as everywhere."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    command += ["-m", "finetune.train", args.config, *args.overrides]
    command += ["--dry-run"] if args.dry_run else []
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # a folder `data` where the user stands is not our package
    return subprocess.run(command, env=environment).returncode

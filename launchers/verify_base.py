"""`moetune verify-base`: check a base checkpoint, and print one pass/fail card."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext, redirect_stdout

EXAMPLE = """\
  moetune verify-base /models/Qwen3-VL-30B-A3B-Instruct
  moetune verify-base Qwen/Qwen3-VL-235B-A22B-Instruct --family qwen3-vl-235b-a22b --device cuda:0 --dtype bfloat16
  moetune verify-base /models/my-base --no-compute --json"""

EXIT_CODES = {3: "a line of the card failed"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("model", metavar="PATH", help="a model folder, or a hub id (owner/name)")
    parser.add_argument("--revision", help="the hub's revision of a hub id")
    parser.add_argument(
        "--family", default="", metavar="NAME", help="the model that it must be (default: recognised by its config)"
    )
    parser.add_argument("--layout", default="auto", help="how the files store experts: auto, hub, memory, per_expert")
    parser.add_argument("--device", default="cpu", help="device to compute on, layer by layer: cpu (default) or cuda:0")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="data type of the computation (default float32)",
    )
    parser.add_argument(
        "--no-compute", action="store_true", help="check only headers and small files: seconds for any size"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the card line by line; return 3 if a check failed."""
    if args.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would search for a GPU, and print so
    from finetune.files.hub import model_folder
    from finetune.verify.base import Options, verify_base
    from finetune.verify.card import Check

    if not args.no_compute:
        from finetune.ranks.device import open_device

        open_device(args.device)
    folder = model_folder(args.model, revision=args.revision)
    options = Options(
        family=args.family, layout=args.layout, device=args.device, dtype=args.dtype, compute=not args.no_compute
    )
    checks: list[Check] = []
    # Libraries print to standard output as they are imported; with --json it is reserved for the object.
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        for check in verify_base(folder, options):
            checks.append(check)
            if not args.json:
                print(f"{check.status:<4}  {check.name:<12}  {check.detail}", flush=True)
    failed = [check.name for check in checks if check.status == "fail"]
    if args.json:
        lines = [{"name": check.name, "status": check.status, "detail": check.detail} for check in checks]
        print(json.dumps({"folder": str(folder), "passed": not failed, "checks": lines}, indent=2))
    else:
        print(f"{folder}: " + (f"FAILED in {', '.join(failed)}" if failed else "passed"))
    return 3 if failed else 0

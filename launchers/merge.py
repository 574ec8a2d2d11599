"""`moetune merge`: merge a base and an adapter into one model folder, in the hub's layout."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.arguments import media_places, place_arguments

if TYPE_CHECKING:
    from finetune.verify.samples import Trial

EXAMPLE = """\
  moetune merge /models/Qwen3-VL-30B-A3B-Instruct runs/mine/adapter /models/mine --verify
  moetune merge /models/Qwen3-VL-30B-A3B-Instruct runs/mine/adapter /models/mine --verify held-out.jsonl
  moetune merge base runs/mine/adapter merged --dtype fp8   # half the size, as servers read FP8 models
  moetune merge base runs/mine/adapter merged --plan        # print what would be written, and its size"""

EXIT_CODES = {3: "a change was lost in rounding, or the proof failed"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "base", metavar="BASE", help="the folder of the base that the adapter was trained on, or a hub id"
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="an adapter folder: ours, PEFT's, or per expert")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--layout", default="auto", help="how the base stores experts: auto, hub, memory, per_expert")
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="files merged at once (default: one more than cores)"
    )
    parser.add_argument(
        "--shard-bytes", type=int, metavar="N", help="bytes of the largest weight file (default: the base's own files)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "fp8"),
        help="type of the merged weights (default: the base's own); fp8 quantises the text layers in blocks of 128",
    )
    parser.add_argument("--plan", action="store_true", help="print the plan, and stop")
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="SAMPLES",
        help="then compare logits with base + adapter, layer by layer: on random samples, or on your shards or JSONL",
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="number of SAMPLES to compare (default 8)")
    place_arguments(parser)
    parser.add_argument("--device", default="cpu", help="device for --verify: cpu (default) or cuda:0")
    parser.add_argument("--other-base", action="store_true", help="accept an adapter that was trained on another base")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the plan, merge, and print the result; return 3 if a change was lost in rounding, or the proof fails."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would search for a GPU, and print so
    from finetune.adapters.merge import merge
    from finetune.adapters.merge_plan import plan_merge
    from finetune.files.basefiles import open_base
    from finetune.files.hub import model_folder

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    for name, least in (("jobs", 0), ("samples", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    base = open_base(model_folder(args.base), layout=args.layout)
    plan = plan_merge(base, args.adapter, other_base=args.other_base, shard_bytes=args.shard_bytes, dtype=args.dtype)
    for line in plan.lines(args.out):
        say(line)
    if args.plan:
        return _finish(args, 0, {"need_bytes": plan.need_bytes, "intended": plan.intended})
    samples: list[Trial] = []
    if args.verify is not None:  # check what the proof needs before the merge
        from finetune.ranks.device import open_device
        from finetune.verify.merged import proof_samples

        open_device(args.device)
        samples = proof_samples(base.folder, args.verify, args.samples, data=plan.data, places=media_places(args))
    merged = merge(plan, args.out, jobs=args.jobs, say=say)
    for line in merged.lines():
        say(line)
    report: dict[str, Any] = {
        "folder": str(args.out),
        "intended": merged.intended,
        "applied": merged.applied,
        "lost": merged.lost,
    }
    proved = True
    if args.verify is not None:
        from dataclasses import asdict

        from finetune.verify.merged import prove

        proof = prove(args.out, plan, samples, device=args.device)
        say(proof.line())
        proved = proof.passed
        report["proof"] = asdict(proof)
    if proved and not merged.lost:
        say(f'next     moetune ask {args.out} "<image>What is it?" --image FILE')
    return _finish(args, 0 if proved and not merged.lost else 3, report)


def _finish(args: argparse.Namespace, code: int, report: dict[str, Any]) -> int:
    if args.json:
        print(json.dumps(report, indent=2))
    return code

"""`moetune doctor`: known traps before GPUs are taken, the wires between nodes, and what ended a run."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from finetune.ranks.autopsy import is_run, page
from launchers.arguments import positive

EXAMPLE = """\
  moetune doctor                                            # this machine
  moetune doctor qwen3-vl-30b-a3b-lora model.path=/models/30b data.sources.general.path=/data/shards
  moetune doctor runs/tiny-cpu                                # why did it hang or die?
  srun --ntasks-per-node=1 moetune doctor --cluster --nnodes 8 --rdzv-endpoint node-a:29501   # the nodes together"""

MACHINE = "versions, kernels, driver, GPUs, shared memory, open files"
"""The checks of a machine."""
RUN = "disk, base, shards, Weights & Biases"
"""The further checks of a run."""
EXIT_CODES = {3: "something was found"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("target", metavar="CONFIG|RUN", nargs="?", help="a recipe, or the folder of a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the recipe's")
    parser.add_argument("--ranks", type=positive, metavar="N", default=1, help="ranks of this machine (default 1)")
    parser.add_argument("--cluster", action="store_true", help="all nodes together: start it on each, under torchrun")
    parser.add_argument("--nnodes", type=positive, metavar="N", default=1, help="with --cluster: nodes")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", default="", help="with --cluster: where they meet")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 3 when there are any."""
    if args.cluster:
        return _cluster(args)
    if args.target and is_run(Path(args.target)):
        lines, wrong = page(Path(args.target))
        print(json.dumps({"page": lines, "wrong": wrong}) if args.json else "\n".join(lines))
        return 3 if wrong else 0
    return _machine(args)


def _machine(args: argparse.Namespace) -> int:
    from finetune.preflight.doctor import machine_findings, run_findings
    from finetune.settings.checks import require
    from finetune.settings.recipes import load_recipe

    config = None
    if args.target:
        config, problems = load_recipe(args.target, args.overrides)
        require(config, problems, ranks=None)
    findings = list(machine_findings(config, ranks=args.ranks, smi=_smi()))
    findings += run_findings(config, ranks=args.ranks) if config is not None else []
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        print(
            "\n".join(map(str, findings))
            or f"nothing is wrong with {MACHINE if config is None else f'{MACHINE}, {RUN}'}"
        )
    return 3 if findings else 0


def _smi() -> str | None:
    from finetune.preflight.doctor import QUERY

    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None  # a machine without GPUs is no finding: laptops prepare data
    return done.stdout or done.stderr


def _cluster(args: argparse.Namespace) -> int:
    """Start this node's ranks; torchrun turns their 3 into 1, so any other code than 0 counts as findings."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}"]
    if args.nnodes == 1:
        command += ["--standalone"]
    elif not args.rdzv_endpoint:
        raise ValueError("--cluster with --nnodes needs --rdzv-endpoint HOST:PORT, the same on every node")
    else:
        command += [f"--nnodes={args.nnodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={args.rdzv_endpoint}"]
        command += ["--rdzv_id=moetune-doctor"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"} | ({"MOETUNE_JSON": "1"} if args.json else {})
    done = subprocess.run([*command, "-m", "finetune.preflight.cluster_check"], env=environment)
    return 0 if done.returncode == 0 else 3

"""`moetune demo`: run every step on a CPU: a base, shards, two-rank LoRA on real images, the adapter, the proof.

First a tiny base is fully trained on letters. Then LoRA, on two ranks with ZeRO-3 and expert parallelism, teaches it
handwritten digits. It is tested on held-out digits before, after, and with shuffled images.
"""

import argparse
import contextlib
import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = """\
  moetune demo runs/demo"""

LEAST = 0.90
"""Least accuracy on held-out digits."""
CHANCE = 0.25
"""Largest accuracy with shuffled images."""

_TOWER = "--vision-depth 2 --vision-hidden 64 --vision-intermediate 128 --vision-heads 4"
_SIZES = "--hidden 64 --head-dim 32 --expert-hidden 96"
"""vLLM's kernels for a CPU take hidden sizes that 32 divides, and heads of 32: what the demo trains can be served."""
_ASK = "eval shards/held-out --max-tokens 4 --batch 64"
_MODEL, _FILE = "runs/base/model", "runs/digits/adapter"
_ADAPTER = f"--model {_MODEL} --adapter {_FILE}"
COMMANDS = (
    f"tiny start --layers 3 {_SIZES} {_TOWER} --image-min-tokens 4",
    "shards build letters.jsonl --out shards/letters",
    "train base.yaml --ranks 2",
    "shards build train.jsonl --out shards/train",
    "shards build held-out.jsonl --out shards/held-out",
    f"{_ASK} --model {_MODEL} --out before.jsonl",
    "train digits.yaml --ranks 2",
    f"{_ASK} {_ADAPTER} --out after.jsonl --at-least exact={LEAST}",
    f"{_ASK} {_ADAPTER} --media shuffled --out shuffled.jsonl --at-most exact={CHANCE}",
    f"merge {_MODEL} {_FILE} merged --verify shards/held-out",
    f"{_ASK} --model merged --out merged.jsonl --at-least exact={LEAST}",
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the final table."""

    what: str
    score: float
    bound: str


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")


def run(args: argparse.Namespace) -> int:
    """Run each command as a user would type it; stop at the first that fails."""
    out: Path = args.out
    if out.exists():
        raise ValueError(f"{out} exists; give another folder, or remove it")
    os.environ["DS_ACCELERATOR"] = "cpu"  # the same device everywhere, so that results can be compared
    try:
        from launchers.demo_material import picture_lines, write_material

        write_material(out)
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo's digits come with scikit-learn: pip install 'moetune[demo]' ({error})") from error
    print(f"$ cd {out}          # base.yaml and digits.yaml are the two recipes", flush=True)
    began = time.monotonic()
    with contextlib.chdir(out):
        for command in COMMANDS:
            if not _run(command):
                return 1
        first, shown = _answers("after.jsonl")[0], _answers("held-out.jsonl")[0]["images"][0]
        print("\n".join(picture_lines(Path(shown))))
        if not _run(f"ask {_MODEL} '<image>What is it?' --image {shown} --adapter {_FILE} --compare"):
            return 1
        lines = [
            Line(what="base, before", score=_accuracy("before.jsonl"), bound=""),
            Line(what="base + adapter, after", score=_accuracy("after.jsonl"), bound=f">= {LEAST:.2f}"),
            Line(what="after, images shuffled", score=_accuracy("shuffled.jsonl"), bound=f"<= {CHANCE:.2f}"),
            Line(what="merged model", score=_accuracy("merged.jsonl"), bound="as base + adapter"),
        ]
        same = _answers("merged.jsonl") == _answers("after.jsonl")
        print(f"the digit shown is a {first['references'][0]}")
        print(_report(lines, time.monotonic() - began))
        if not same:
            print("demo: the answers of the merged model differ from those of base and adapter")
    return 0 if same else 1


def _run(command: str) -> bool:
    """Print the command, run it, and return whether it succeeded."""
    from launchers.cli import main

    print(f"\n$ moetune {command}", flush=True)
    code = main(shlex.split(command))
    if code:
        print(f"demo: stopped, because `moetune {shlex.split(command)[0]}` ended with exit code {code}")
    return not code


def _answers(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def _accuracy(file: str) -> float:
    scores = [answer["scores"]["exact"] for answer in _answers(file)]
    return float(sum(scores) / len(scores))


def _report(lines: list[Line], seconds: float) -> str:
    table = [f"{'held-out digits, exact':<26}{'score':>8}  required"]
    table += [f"{line.what:<26}{line.score:>8.3f}  {line.bound}".rstrip() for line in lines]
    return "\n" + "\n".join([*table, f"in {seconds / 60:.1f} minutes"])

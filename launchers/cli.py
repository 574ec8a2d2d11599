"""The command `moetune`. Each command is a module of this package, loaded only when called.

argparse, because a command's name, its few flags and `key=value` are all there is, and it costs no start time.
docs/commands.md is made from the parsers (`launchers/reference.py`).
"""

import argparse
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from data.format.printable import printable

COMMANDS = {  # in the order in which people meet them
    "init": "write a small recipe of your own, from a few answers or flags, with the planner's layout",
    "recipes": "the shipped recipes, each with its hardware and a line; or the text of one, to copy from",
    "check": "read a recipe, print the effective config and every derived number, name every problem",
    "explain": "what a configuration key means, when to change it, and what it interacts with",
    "plan": "what a run takes before it runs: memory, traffic, time, cost; --fit proposes a layout",
    "doctor": "known traps before GPUs are taken; the nodes together; why a run hung or died",
    "tiny": "write a small base model, in the hub's own layout, with random weights",
    "verify-base": "one pass/fail card for a base checkpoint: files, config, tokenizer, template, logits",
    "shards": "build, index, check, show, count and split webdataset shards",
    "train": "train on this machine: from a base and shards, or a JSONL file, to an adapter",
    "launch": "the same run anywhere: torchrun, deepspeed, Slurm or Kubernetes, from one profile a cluster",
    "eval": "ask a model or a server held-out questions, and score the answers by source",
    "ask": "put a question, with images and videos, to a base, a base with its adapter, or a merged model",
    "probe": "needles in long contexts, of text and of video: base against adapted, as a heatmap and JSON",
    "merge": "a base and an adapter into one model folder in the hub's layout, and the proof of it",
    "export": "an adapter in the form that a server reads: PEFT's packed one, or 2-D keys expert by expert",
    "combine": "a weighted sum of adapters, experts included: exact, or of a smaller rank with its error stated",
    "serve": "the exact command for vLLM, sglang and transformers, or a server started and checked",
    "serve-check": "does a live server compute what we compute, from pixels to log-probabilities?",
    "env": "what an issue report needs: versions, GPUs, memory, disks and variables of this machine",
    "demo": "the whole way on a CPU: base, shards, two-rank LoRA on real images, adapter, merge, proof",
}

EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "the input is wrong",
    3: "a check found problems",
    75: "preempted: run the same command again",
    76: "a guard stopped the run",
    130: "Ctrl-C",
}
"""What the exit codes of all commands mean; a command's own EXIT_CODES say what one means there."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of one command line, with `run` for what carries it out."""
    parser = argparse.ArgumentParser(
        prog="moetune",
        description="Fine-tune Qwen3-VL mixture-of-experts models.",
        epilog=f"exit codes: {', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moetune {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name != called:
            commands.add_parser(name, help=summary)
            continue
        add_command(commands, name)
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional words only where they stand together; a key=value behind an option is one as well
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    args = parse(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if args.debug:
            raise
        _complain(args, "interrupted")
        return 130
    except ValueError as error:
        if args.debug:
            raise
        _complain(args, error)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written: the run failed, the input is not wrong
        if args.debug:
            raise
        if not _reader_is_gone():
            _complain(args, error)
        return 1
    return code


def _complain(args: argparse.Namespace, error: object) -> None:
    """Print why a command ended; an escape sequence of data or of a server in it is shown, not obeyed."""
    print(printable(f"moetune {args.command}: {error}"), file=sys.stderr)


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> argparse.ArgumentParser:
    """Add the whole parser of one command, from its module."""
    module, summary = import_module(f"launchers.{name.replace('-', '_')}"), COMMANDS[name]
    own = [f"exit code {code}: {meaning}" for code, meaning in getattr(module, "EXIT_CODES", {}).items()]
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}{'' if summary.endswith('?') else '.'}",
        epilog="\n".join([f"example:\n{module.EXAMPLE}", *(["", *own] if own else [])]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an input error")
    module.arguments(command)
    command.set_defaults(run=module.run)
    return command


def _reader_is_gone() -> bool:
    """Say whether the reader of our lines has closed the pipe, as `head` does; later output then goes nowhere."""
    stdout = select.poll()
    stdout.register(1, 0)  # a pipe without a reader reports an error whatever events are registered
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def entry() -> NoReturn:
    """Run the installed console command."""
    sys.exit(main(sys.argv[1:]))


def _version() -> str:
    try:
        return version("moetune")
    except PackageNotFoundError:
        return "(not installed, running from its source)"


if __name__ == "__main__":
    entry()

"""The command `moetune`. Each command is a module of this package, imported only when called.

argparse is enough for a command's name, a few flags and `key=value`, and it adds no start time. docs/commands.md is
generated from the parsers (`launchers/reference.py`).
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

COMMANDS = {  # in the order in which users need them
    "init": "write a small recipe of your own, from a few answers or flags, with the planner's layout",
    "recipes": "list the shipped recipes with their hardware, or print one to copy from",
    "check": "read a recipe, print the effective config and every derived number, and name every problem",
    "explain": "explain a configuration key: its meaning, when to change it, and what it interacts with",
    "plan": "estimate a run's memory, traffic, time and cost before it starts; --fit proposes a layout",
    "doctor": "check for known problems before a run, test the nodes together, or find out why a run hung or died",
    "tiny": "write a small base model with random weights, in the hub's own layout",
    "verify-base": "check a base checkpoint: files, config, tokenizer, template, logits; one pass/fail card",
    "shards": "build, index, check, show, count, split and compare webdataset shards",
    "train": "train an adapter on this machine, from a base and shards or a JSONL file",
    "launch": "start the same run anywhere: torchrun, deepspeed, Slurm or Kubernetes, with one profile per cluster",
    "runs": "list the runs in a folder: state, step, best metric, base, size, and why one did not finish",
    "report": "write what a run recorded as one HTML file; several runs are compared",
    "eval": "ask a model or a server held-out questions, and score the answers by source",
    "ask": "ask a base, a base with its adapter, or a merged model one question, with images and videos",
    "probe": "test a mechanism on made-up media: needles, timestamps, DeepStack, order, resolution, load of experts",
    "merge": "merge a base and an adapter into one model folder in the hub's layout, and verify it",
    "export": "convert an adapter to the form that a server reads: PEFT's packed one, or 2-D keys per expert",
    "combine": "add adapters with weights, experts included: exact, or reduced in rank with the error printed",
    "serve": "print the exact command for vLLM, sglang and transformers, or start a server and check it",
    "serve-check": "compare a live server with our own computation, from pixels to log-probabilities",
    "harness": "score served models with lmms-eval, a standard harness, the base beside the tuned model",
    "env": "print what an issue report needs: versions, GPUs, memory, disks and variables of this machine",
    "demo": "run every step on a CPU: base, shards, two-rank LoRA on real images, adapter, merge, proof",
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
"""Meanings of the exit codes in all commands; a command's own EXIT_CODES are more specific."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse one command line; `run` of the result is the command's function."""
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
    # argparse accepts positional words only in one group; accept a key=value after an option as well
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
    except OSError as error:  # a full disk or a folder without write permission: a failure, not a wrong input
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
    """Add the complete parser of one command, from its module."""
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
    """Return whether the reader of our output has closed the pipe, as `head` does; if so, discard later output."""
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
        return "(not installed, running from source)"


if __name__ == "__main__":
    entry()

"""`moetune train`: start the training loop on this machine's ranks, through torchrun."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from finetune.ranks.signals import PREEMPTED
from launchers.arguments import positive
from launchers.render import SHUTDOWN

EXAMPLE = """\
  moetune tiny base
  moetune train tiny-cpu --ranks 2 model.path=base data.sources.general.path=train.jsonl"""

GRACE_S = 30
"""Seconds that torchrun waits after SIGTERM: a checkpoint takes at most 25, or it is not the last one."""
STOPS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that schedulers warn with. Unless it handles SIGUSR1, that would kill torchrun and orphan its ranks."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
    parser.add_argument("--ranks", type=positive, metavar="N", default=1, help="processes, one a GPU (default 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="checks, shards, memory and one real step; leave nothing"
    )
    parser.add_argument("--replay", metavar="FOLDER", help="take a kept step again, and name what is not finite in it")


def run(args: argparse.Namespace) -> int:
    """Hand over to torchrun, pass signals on, and say which rank failed first."""
    from finetune.checkpoint.folder import starting_point
    from finetune.ranks.failures import first_failure, outcome_since
    from finetune.ranks.versions import torch_problem
    from finetune.settings.checks import require
    from finetune.settings.recipes import load_recipe

    if torch_problem():
        raise ValueError(torch_problem())
    config, problems = load_recipe(args.config, args.overrides)
    folder, since = Path("runs") / config.run.name, time.time()
    resuming = starting_point(folder / "checkpoints", config.checkpoint.resume) is not None
    require(config, problems, ranks=args.ranks, resuming=resuming)  # within a second, not after every rank's start
    logs = folder.with_name(f"{folder.name}.dry-run.logs") if args.dry_run else folder / "logs"
    code, signals = _torchrun(args)
    outcome, first = outcome_since(logs, since), first_failure(logs, since=since)
    if args.dry_run:
        shutil.rmtree(logs, ignore_errors=True)
    if outcome == "problems":
        return 3
    if code == 0 and outcome in ("", "done"):  # a replay has none
        return 0
    if outcome == "preempted":
        return _end("preempted; run the same command again to go on", PREEMPTED)
    if signals and signals[0] == signal.SIGINT:
        return _end("interrupted", 1)
    if signals:
        return _end("ended by a signal before it could save; the same command goes on from the last save", PREEMPTED)
    if first is None or first.kind == "lost":
        text = "a rank ended without a word, as a process that is killed does (out of memory?)"
        return _end(f"{text}. torchrun names it above; {logs} has each rank's last stage", 1)
    log = logs / f"rank-{first.rank:04d}.log"
    return _end(f"rank {first.rank} failed first: {first.message} ({log})", first.code)


def _end(text: str, code: int) -> int:
    """Print how the run ended, and return its exit code."""
    print(f"moetune train: {text}", file=sys.stderr)
    return code


def rank_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the ranks, from this process's own."""
    added = {
        "PYTHONSAFEPATH": "1",  # a folder `data` in the working directory is not our package
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or a restart reads addresses of ranks that are gone
        SHUTDOWN: str(GRACE_S),
    }
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & ours.keys():
        added["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # rows differ, and would leave holes in GPU memory
    return {**ours, **added}


def _torchrun(args: argparse.Namespace) -> tuple[int, list[int]]:
    """Run torchrun to its end; return its exit code, and the signals that came in the meantime."""
    signals: list[int] = []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    command += [f"--signals-to-handle=SIGINT,SIGQUIT,{','.join(STOPS)}"]
    command += ["-m", "finetune.train", args.config, *args.overrides]
    command += ["--dry-run"] if args.dry_run else []
    command += ["--replay", args.replay] if args.replay else []
    environment = rank_environment(os.environ)
    # in a group of its own: Ctrl-C comes to us alone, and is passed on once
    with subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_end_with_parent) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in map(_number, ("SIGINT", *STOPS))}
        try:
            return process.wait(), signals
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _number(name: str) -> signal.Signals:
    return signal.Signals[name]


def _end_with_parent() -> None:
    """In the child, before it becomes torchrun: should we be killed, it is killed too, and its ranks see that."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

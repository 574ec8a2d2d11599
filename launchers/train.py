"""`moetune train`: start the training loop on this machine's ranks, through torchrun."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from uuid import uuid4

from data.format.printable import printable
from finetune.ranks.log import LAUNCHER_LOGS
from finetune.ranks.signals import GUARDED, PREEMPTED
from launchers.arguments import positive
from launchers.render import SHUTDOWN

EXAMPLE = """\
  moetune tiny base
  moetune train tiny-cpu --ranks 2 model.path=base data.sources.general.path=train.jsonl"""

GRACE_S = 30
"""Seconds that torchrun waits after SIGTERM: a checkpoint takes at most 25, or it is not the last one."""
LOG = "launcher.log"
"""The log of torchrun's and its ranks' standard error, in the run's logs."""
LOOK_S = 0.5
"""Seconds between two looks at why ranks ended, before torchrun has them started again."""
ROOM_BYTES = 64 * 2**10
"""Bytes that a disk must take to count as one with room."""
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
    parser.add_argument(
        "--restarts",
        type=positive,
        metavar="N",
        default=0,
        help="start all ranks again this often when one fails, from the last checkpoint (default 0)",
    )
    several = parser.add_argument_group(
        "several machines", "Give the same command on each; `moetune launch` writes it."
    )
    several.add_argument("--nodes", type=positive, metavar="N", default=1, help="machines (default 1)")
    several.add_argument("--meet", metavar="HOST:PORT", help="one of the machines, and a free port there")
    several.add_argument("--start", metavar="NAME", help="what tells this start of the run from all others")
    several.add_argument("--min-nodes", type=positive, metavar="N", help="go on with as few machines (default: all)")
    several.add_argument(
        "--join-seconds", type=positive, metavar="S", default=900, help="wait so long for the others (default 900)"
    )
    several.add_argument(
        "--preempted-code",
        type=int,
        metavar="CODE",
        default=PREEMPTED,
        help=f"exit code when another start goes on (default {PREEMPTED}); some schedulers retry certain codes only",
    )


def run(args: argparse.Namespace) -> int:
    """Hand over to torchrun, pass signals on, and say which rank failed first."""
    from finetune.checkpoint.run_lock import take_run_for_ranks
    from finetune.preflight.start import require_start
    from finetune.ranks.log import print_line, remove_logs
    from finetune.ranks.versions import torch_problem
    from finetune.report.page import try_report
    from finetune.settings.recipes import load_recipe

    if torch_problem():
        raise ValueError(torch_problem())
    _check_machines(args)
    config, problems = load_recipe(args.config, args.overrides)
    folder, run_id = config.run.path, args.start or uuid4().hex
    trains = not (args.dry_run or args.replay)
    for line in require_start(config, problems, ranks=args.ranks * args.nodes, trains=trains, run_id=run_id):
        print(line, flush=True)
    if not trains:
        logs = folder.with_name(f"{folder.name}.dry-run.logs") if args.dry_run else folder / "logs"
        code = verdict(*_torchrun(args, run_id, logs), logs=logs, run_id=run_id, leaves_outcome=False)
        if args.dry_run and code != 1:  # the traceback of a failure is there
            remove_logs(logs)
        return code
    limit, logs = config.run.stall_seconds, folder / "logs"
    # of several machines the one with rank 0 takes the run, and which that is shows when they have met
    release = (
        take_run_for_ranks(folder, run_id=run_id, stall_seconds=limit, say=print_line) if args.nodes == 1 else None
    )
    try:
        code, signals = _torchrun(args, run_id, logs)
    finally:
        if release is not None:
            release()
    code = verdict(code, signals, logs=logs, run_id=run_id, leaves_outcome=True, nodes=args.nodes)
    if code not in (0, PREEMPTED, GUARDED) and (folder / "metrics.jsonl").is_file():
        print(try_report(folder), flush=True)
    return args.preempted_code if code == PREEMPTED else code


def _check_machines(args: argparse.Namespace) -> None:
    if args.nodes > 1 and not (args.meet and args.start):
        raise ValueError(
            f"--nodes {args.nodes} needs --meet HOST:PORT and --start NAME, the same on each machine. `moetune launch` "
            f"writes the command"
        )
    if (args.min_nodes or 1) > args.nodes:
        raise ValueError(f"--min-nodes is {args.min_nodes}, and --nodes {args.nodes}: it must not be more than that")


def verdict(code: int, signals: Sequence[int], *, logs: Path, run_id: str, leaves_outcome: bool, nodes: int = 1) -> int:
    """Say why torchrun ended with `code`, after these signals, and return our own exit code."""
    from finetune.ranks.failures import first_failure, outcome_of

    outcome, first = outcome_of(logs, run_id), first_failure(logs, start=run_id)
    if code == 0 and (outcome == "done" or not (outcome or leaves_outcome)):
        return 0
    if outcome == "preempted":
        return _end("preempted; run the same command again to continue", PREEMPTED)
    if outcome == "guarded":
        return _end("a guard stopped the run. Raise its bound, and the same command continues", GUARDED)
    if signals and signals[0] == signal.SIGINT:
        return _end("interrupted; the same command continues from the last save", 128 + signal.SIGINT)
    if signals or code == 0:
        return _end("ended by a signal before it could save; the same command continues from the last save", PREEMPTED)
    if code < 0:
        name = signal.Signals(-code).name
        return _end(
            f"torchrun was ended by {name}, and its ranks with it; the same command continues from the last save", 1
        )
    if first is not None and first.kind == "input":
        return _end(first.message, first.code)
    if first is not None and first.kind != "lost":
        log = logs / f"rank-{first.rank:04d}.log"
        return _end(f"rank {first.rank} failed first: {first.message}\nIts log: {log}", first.code)
    if first is not None and nodes > 1:  # no rank failed, and one is gone: with its machine, or torchrun there
        return _end("a machine was lost; another start continues from the last save", PREEMPTED)
    if reason := _why_unwritable(logs):
        return _end(f"a rank ended, and could not write why: {reason}. Make room there, and run the same command", 1)
    text = f"a rank ended without a message; {logs / LOG} has what it and torchrun wrote"
    return _end(f"{text}, and `moetune doctor {logs.parent}` says where each rank was", 1)


def _why_unwritable(logs: Path) -> str:
    """Return what keeps ranks from writing there, as a full or a read-only disk does; "" for nothing."""
    probe = logs / "room"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(ROOM_BYTES))
    except OSError as error:
        return str(error)
    finally:
        with suppress(OSError):
            probe.unlink()
    return ""


def _end(text: str, code: int) -> int:
    """Print how the run ended, under Slurm on the first of several machines, and return its exit code."""
    if os.environ.get("SLURM_PROCID", "0") == "0":
        print(printable(f"moetune train: {text}"), file=sys.stderr)
    return code


def rank_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the ranks, from this process's own."""
    added = {
        "PYTHONSAFEPATH": "1",  # a folder `data` in the working directory is not our package
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or a restart reads addresses of ranks that are gone
        SHUTDOWN: ours.get(SHUTDOWN, str(GRACE_S)),
    }
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & ours.keys():
        added["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # rows differ, and would leave holes in GPU memory
    return {**ours, **added}


def _torchrun(args: argparse.Namespace, run_id: str, logs: Path) -> tuple[int, list[int]]:
    """Run torchrun to its end; return its exit code, and the signals that came in the meantime.

    Its standard error, which is that of its ranks, goes into a log: it is tracebacks and words of libraries.
    """
    from finetune.preflight.rank import LOOKED

    signals: list[int] = []
    environment = rank_environment(os.environ) | {LAUNCHER_LOGS: str(logs), LOOKED: run_id}
    command = [sys.executable, "-m", "finetune.ranks.torchrun", f"--nproc_per_node={args.ranks}"]
    # as --standalone, but with a name by which we know what this start wrote
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint={args.meet or 'localhost:0'}", f"--rdzv_id={run_id}"]
    if args.nodes > 1:
        command += [f"--nnodes={args.min_nodes or args.nodes}:{args.nodes}"]
        command += [f"--rdzv_conf=join_timeout={args.join_seconds},close_timeout={environment[SHUTDOWN]}"]
    command += [f"--max_restarts={args.restarts}"]
    command += [f"--signals-to-handle=SIGINT,SIGQUIT,{','.join(STOPS)}"]
    command += ["-m", "finetune.train", args.config, *args.overrides]
    command += ["--dry-run"] if args.dry_run else []
    command += ["--replay", args.replay] if args.replay else []
    logs.mkdir(parents=True, exist_ok=True)
    with (
        (logs / LOG).open("a") as errors,
        # in a group of its own: Ctrl-C comes to us alone, and is passed on once
        subprocess.Popen(
            command, env=environment, stderr=errors, process_group=0, preexec_fn=_end_with_parent
        ) as process,
    ):

        def pass_on(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in map(_number, ("SIGINT", *STOPS))}
        try:
            return _ended(process, logs, run_id) if args.restarts else process.wait(), signals
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ended(process: "subprocess.Popen[bytes]", logs: Path, run_id: str) -> int:
    """Wait for torchrun, which starts ranks again whatever ended them: end it where they would only end so again."""
    from finetune.ranks.failures import first_failure, outcome_of

    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=LOOK_S)
        failure = first_failure(logs, start=run_id)
        if (failure is not None and failure.kind == "input") or outcome_of(logs, run_id) in ("preempted", "guarded"):
            process.terminate()
            return process.wait()


def _number(name: str) -> signal.Signals:
    return signal.Signals[name]


def _end_with_parent() -> None:
    """Have the kernel kill this child if its parent is killed; called before the child becomes torchrun."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

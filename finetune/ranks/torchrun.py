"""torchrun, as `moetune train` starts it: `python -m finetune.ranks.torchrun ...` takes the same arguments.

A rank that is killed cannot say so. torchrun knows, and its report is kept as the failure of that rank.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from finetune.ranks.causes import ONWARD
from finetune.ranks.failures import Failure, first_failure, write_failure
from finetune.ranks.log import LAUNCHER_LOGS

CAUSES = {
    signal.SIGKILL: "killed by SIGKILL, usually by the kernel when memory runs out (dmesg then says so)."
    "\nReduce the memory of the run: lower data.tokens_per_pack, data.workers or --ranks; `moetune plan` shows what a "
    f"rank needs.\n{ONWARD}",
    signal.SIGBUS: "killed by SIGBUS, usually because shared memory is full."
    f"\nGive the container a larger /dev/shm, or set data.workers=0. {ONWARD}",
}
"""The usual causes and remedies, by the signal that ended a process."""
CRASH = "killed by {name}: a library crashed. `moetune env` lists the versions for an issue report"


def keep_killed(failures: Mapping[int, ProcessFailure], *, logs: Path, run_id: str) -> None:
    """Record the ranks that a signal ended first; torchrun itself ended the others later, which says nothing."""
    began = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        if failure.exitcode >= 0 or -failure.exitcode == signal.SIGTERM or failure.timestamp > began:
            continue
        number = signal.Signals(-failure.exitcode)
        message = CAUSES.get(number, CRASH.format(name=number.name))
        killed = Failure(
            rank=rank, host=socket.gethostname(), time=time.time(), kind="killed", message=message, start=run_id
        )
        write_failure(logs, killed)


def main(argv: Sequence[str]) -> None:
    """Run torchrun, and keep its report of ranks that were killed."""
    run_id = next(word.partition("=")[2] for word in argv if word.startswith("--rdzv_id="))
    logs = Path(os.environ[LAUNCHER_LOGS])
    try:
        torchrun(list(argv))
    except ChildFailedError as error:
        first = first_failure(logs, start=run_id)
        if first is None or first.kind == "lost":
            keep_killed(error.failures, logs=logs, run_id=run_id)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])

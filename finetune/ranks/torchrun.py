"""torchrun, as `moetune train` starts it: `python -m finetune.ranks.torchrun ...` takes the same arguments.

A rank that is killed cannot say so. torchrun knows, and its word is kept as that rank's failure.
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

from finetune.ranks.failures import Failure, first_failure, write_failure
from finetune.ranks.log import LAUNCHER_LOGS

CAUSES = {
    signal.SIGKILL: "killed by SIGKILL, as the kernel does to a process when memory runs out (its log, dmesg, says so)."
    "\nGive the run less to hold: lower data.tokens_per_pack, data.workers or --ranks; `moetune plan` says what a rank "
    "takes.\nThe same command goes on from the last save",
    signal.SIGBUS: "killed by SIGBUS, as a process is whose shared memory is full."
    "\nGive the container a larger /dev/shm, or set data.workers=0. The same command goes on from the last save",
}
"""The most frequent causes of a process ended by a signal, and their cures."""
CRASH = "killed by {name}: a library crashed. `moetune env` lists the versions, which an issue report needs"


def keep_killed(failures: Mapping[int, ProcessFailure], *, logs: Path, run_id: str) -> None:
    """Write down which ranks a signal ended first; what torchrun did to the others later tells nothing."""
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
    """Run torchrun, and keep the word of it about ranks that were killed."""
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

"""Run a function on N gloo ranks, and report which rank failed first, and why.

`run_ranks(function, world_size, *args)` returns the results of all ranks, in rank order. The function is defined at
module level, `def f(rank, world_size, *args)`, and is called with the process group up. If a rank raises, vanishes or
hangs, one `RankError` names it and shows its traceback (or its stack) and its output; the other ranks are ended.

Ranks are forked from a server that has imported the libraries, so a start takes tenths of a second. With `fresh=True`,
each rank is a new process that imports everything itself, which takes some seconds of CPU time.
"""

import contextlib
import datetime
import faulthandler
import fcntl
import functools
import gc
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S

GRACE_S = 5.0  # time after the first failure for other failed ranks to report
PRELOADED = (
    "torch",
    "torch.distributed",
    "transformers",
    "peft",
    "deepspeed",
    "finetune.train",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # each engine imports it at its start, with torch's compiler
)
SHOWN_CHARS = 6000  # the last characters of a rank's output


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = LIMIT_S, fresh: bool = False
) -> list[Any]:
    """Return `function(rank, world_size, *args)` of every rank; raise RankError for the rank that failed first.

    `timeout` counts from the moment when all ranks have started; a collective may wait for half of it.
    """
    context = multiprocessing.get_context("spawn") if fresh else _server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        call = pickle.dumps((function, args))
        environment = {**os.environ, **_RANK_ENVIRONMENT, "WORLD_SIZE": str(world_size)}
        ranks = [
            context.Process(target=_work, args=(r, world_size, folder, environment, Path.cwd(), call, timeout / 2))
            for r in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            hung = _watch(ranks, folder, timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        if hung or not all(_succeeded(rank, process, folder) for rank, process in enumerate(ranks)):
            raise _verdict(ranks, folder, hung, timeout)
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


# --- in the test's process --------------------------------------------------------------------------------------------

_RANK_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@functools.cache
def _server() -> Any:
    """Start the process from which ranks are forked; it has one thread, or a fork might inherit a held lock."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with pytest.MonkeyPatch.context() as patch:  # for the server's imports; ranks get the caller's environment
        for name, value in _RANK_ENVIRONMENT.items():
            patch.setenv(name, value)  # read at import, when DeepSpeed picks its accelerator and BLAS starts threads
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # this clone's code, not an installed one
        multiprocessing.forkserver.ensure_running()
    return context


def _watch(ranks: list[Any], folder: Path, timeout: float) -> list[int]:
    """Wait for all ranks, until `timeout` after the start or GRACE_S after a failure; return those that still run."""
    deadline = time.monotonic() + LIMIT_S
    running = dict(enumerate(ranks))
    failed = all_began = False
    while running and (left := deadline - time.monotonic()) > 0:
        sentinels = [process.sentinel for process in running.values()]
        multiprocessing.connection.wait(sentinels, timeout=left if all_began else min(left, 0.1))
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            if not failed and not _succeeded(rank, process, folder):
                failed = True
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if not all_began and not failed and all((folder / f"{rank}.began").exists() for rank in range(len(ranks))):
            all_began = True
            deadline = time.monotonic() + timeout
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):  # the process has just ended
            os.kill(process.pid, signal.SIGUSR1)  # the rank writes its stack, whatever it is doing, and ends
    for process in running.values():
        process.join(GRACE_S)
    return list(running)


def _succeeded(rank: int, process: Any, folder: Path) -> bool:
    return process.exitcode == 0 and (folder / f"{rank}.result").exists()


def _verdict(ranks: list[Any], folder: Path, hung: list[int], timeout: float) -> "RankError":
    """Name the culprits: ranks that vanished before the first one raised, else that one, else those that hang."""
    reports = {r: pickle.loads(p.read_bytes()) for r in range(len(ranks)) if (p := folder / f"{r}.raised").exists()}
    silent = [r for r, p in enumerate(ranks) if r not in reports and r not in hung and not _succeeded(r, p, folder)]
    first = min(reports, key=lambda rank: reports[rank]["time_ns"], default=None)
    culprits = silent or hung
    if first is not None:
        culprits = [r for r in silent if r in reports[first]["gone"]] or [first]
    parts = []
    for rank in culprits + [r for r in range(len(ranks)) if r not in culprits]:
        if rank in reports:
            found = f"failed:\n{reports[rank]['traceback']}"
        elif rank in hung:
            when = ", and was ended" if reports or silent else f" after {timeout:g} s"
            found = f"was still running{when}; its stack:\n{_stack(folder / f'{rank}.stack')}"
        elif rank in silent:
            found = f"exited without raising ({_exit_words(ranks[rank].exitcode)})"
        else:
            continue
        printed = _text(folder / f"{rank}.printed")[-SHOWN_CHARS:].rstrip()
        parts.append(
            f"rank {rank} of {len(ranks)} {found.rstrip()}" + (f"\n  it printed:\n{printed}" if printed else "")
        )
    return RankError("\n\n".join(parts), rank=culprits[0])


def _exit_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _stack(path: Path) -> str:
    """Return the threads of a dump, without our own watcher thread."""
    return "\n\n".join(thread for thread in _text(path).split("\n\n") if _end_with_parent.__name__ not in thread)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# --- in a rank --------------------------------------------------------------------------------------------------------


def _work(
    rank: int, world_size: int, folder: Path, environment: dict[str, str], cwd: Path, call: bytes, limit: float
) -> None:
    """Run one rank; it leaves `N.result` or `N.raised`, or neither if it vanishes."""
    _redirect(folder / f"{rank}.printed")
    faulthandler.register(
        signal.SIGUSR1, file=(folder / f"{rank}.stack").open("w"), chain=True
    )  # the chained handler ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(cwd)
    gc.freeze()  # DeepSpeed collects garbage at every start of an engine: skip everything that the server imported
    with _reported(rank, world_size, folder), _alive(rank, folder):
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(call)
        store = torch.distributed.FileStore(str(folder / "store"), world_size)
        store.set(str(rank), "began")
        store.wait([str(other) for other in range(world_size)], datetime.timedelta(seconds=LIMIT_S))
        (folder / f"{rank}.began").touch()
        torch.distributed.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(
                seconds=limit
            ),  # before the test's timeout: a waiting rank reports its collective
        )
        result = pickle.dumps(function(rank, world_size, *args))
        torch.distributed.destroy_process_group()
        (folder / f"{rank}.result").write_bytes(result)


def _end_with_parent() -> None:
    """End this rank if its parent dies, so that a killed test run leaves no orphans."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _redirect(path: Path) -> None:
    with path.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(line_buffering=True)  # os._exit does not flush


@contextlib.contextmanager
def _alive(rank: int, folder: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when this process ends, before it closes the process's connections."""
    with (folder / f"{rank}.starting").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        Path(file.name).rename(folder / f"{rank}.alive")
        yield


def _gone(rank: int, folder: Path) -> bool:
    """Return whether a rank has started and ended."""
    path = folder / f"{rank}.alive"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


class _reported:
    """Writes an exception that leaves the block, with its time, before this process's end makes other ranks fail."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.rank, self.others, self.folder = rank, [r for r in range(world_size) if r != rank], folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            return
        time_ns = time.monotonic_ns()
        gone = [r for r in self.others if _gone(r, self.folder)]
        text = "".join(traceback.format_exception(error))
        part = self.folder / f"{self.rank}.part"
        part.write_bytes(pickle.dumps({"time_ns": time_ns, "gone": gone, "traceback": text}))
        part.rename(self.folder / f"{self.rank}.raised")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the process group may be stuck; its destructor would wait for it


class RankError(RuntimeError):
    """The failures of the ranks; `rank` is the one that failed first."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank

"""Errors of libraries and of the machine become a cause and a cure in a few lines, whoever reports them."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from finetune.ranks.causes import LINES, told
from finetune.ranks.failures import first_failure, forget_failure, keep_failure, report_early
from finetune.ranks.log import LAUNCHER_LOGS, RankLog
from finetune.ranks.torchrun import keep_killed
from launchers.train import verdict

CUDA = (
    "CUDA error: {what}\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with "
    "`TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (CUDA.format(what="uncorrectable ECC error encountered"), r"error encountered \(GPU 3 of h\)\.\n.*nvidia-smi"),
        (CUDA.format(what="device-side assert triggered"), r"triggered \(GPU 3 of h\)\.\n.*CUDA_LAUNCH_BLOCKING"),
        ("CUDA out of memory. Tried to allocate 2 GiB. " + "x" * 400, r"memory.* \.\.\. \(GPU 3 of h\)\.\n.*recompute"),
        ("[enforce fail at x] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes", r"8 bytes\.\n.*workers"),
        ("MemoryError", r"^MemoryError\.\nMemory is full"),
        ("rank 0 failed:\nIO Error: No space left on device (os error 28)", r"^IO Error: No.*\.\nThe disk is full"),
        ("[Errno 30] Read-only file system: 'runs/x'", r"'runs/x'\.\nThe disk was made read-only"),
        ("[Errno 27] File too large: 'shard'", r"'shard'\.\n.*ulimit -f"),
        ("one\ntwo\nthree\nfour\nfive", r"^one\ntwo\nthree\n\.\.\.$"),
        ("step 3: loss is nan", r"^step 3: loss is nan$"),
    ],
)
def test_long_errors_of_libraries_become_a_cause_and_a_cure(text: str, says: str) -> None:
    shown = told(text, place="GPU 3 of h")
    assert re.search(says, shown), shown
    assert len(shown.splitlines()) <= LINES


def test_only_the_rank_that_a_signal_ended_first_is_named(tmp_path: Path, capsys) -> None:
    def ended(code: int, after: int = 0) -> ProcessFailure:
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="")
        failure.timestamp += after
        return failure

    codes = {0: ended(1), 1: ended(-signal.SIGKILL), 2: ended(-signal.SIGTERM), 3: ended(-signal.SIGKILL, after=30)}
    keep_killed(codes, logs=tmp_path, run_id="now")
    assert [path.name for path in tmp_path.iterdir()] == ["failure-0001.json"]
    assert verdict(1, [], logs=tmp_path, run_id="now", leaves_outcome=True) == 1
    said = capsys.readouterr().err
    assert said.startswith("moetune train: rank 1 failed first: killed by SIGKILL, usually by the kernel")
    assert len(said.splitlines()) <= 6
    for number, words in ((signal.SIGBUS, "/dev/shm"), (signal.SIGSEGV, "killed by SIGSEGV: a library crashed")):
        keep_killed({1: ended(-number)}, logs=tmp_path, run_id="now")
        killed = first_failure(tmp_path, start="now")
        assert killed is not None
        assert words in killed.message


def test_an_error_before_a_rank_has_a_log_reaches_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv(LAUNCHER_LOGS, str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "before")
    log, other = (RankLog(tmp_path, rank) for rank in (0, 2))
    keep_failure(other, "failed", "of an earlier start")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "now")
    assert report_early(1, ValueError("this rank sees no GPU")) == 2
    forget_failure(log)
    for one in (log, other):
        one.close()
    assert [path.name for path in tmp_path.glob("failure-*")] == ["failure-0001.json"]
    assert capsys.readouterr().err == ""
    assert verdict(1, [], logs=tmp_path, run_id="now", leaves_outcome=True) == 2
    assert capsys.readouterr().err == "moetune train: this rank sees no GPU\n"


def test_without_our_launcher_the_first_rank_of_a_host_reports(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for local, waits in (("0", 0), ("1", 1)):
        monkeypatch.setitem(os.environ, "LOCAL_RANK", local)
        assert report_early(int(local), OSError(13, "Permission denied", "runs")) == 1
        assert len(slept) == waits  # in the meantime, the launcher ends it, unless only this rank has failed
    assert capsys.readouterr().err.count("moetune train, rank 1: [Errno 13] Permission denied: 'runs'\n") == 1

"""Mistakes that only a run can meet: each ends in one message that names cause and cure, without a traceback."""

import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from starts import toy_run
from user_runs import TRAIN, start

AT_THE_WEIGHTS = """
import os, signal, sys
def at_the_weights(event, arguments):
    if event == "open" and os.environ.get("RANK") == "1" and "base/model" in str(arguments[0]):
        {what}
sys.addaudithook(at_the_weights)
"""
LOST_GPU = """raise RuntimeError(
            "CUDA error: uncorrectable ECC error encountered\\\\nCUDA kernel errors might be asynchronously reported "
            "at some other API call, so the stacktrace below might be incorrect.\\\\nFor debugging consider passing "
            "CUDA_LAUNCH_BLOCKING=1\\\\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\\\\n")"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory.mktemp("user"), 48, images=True)


def _is_one_message(done: CompletedProcess[str], code: int, says: str) -> None:
    assert done.returncode == code, done.stderr
    assert re.match(rf"moetune train: {says}", done.stderr, re.DOTALL), done.stderr
    assert len(done.stderr.splitlines()) <= 6, done.stderr
    assert not re.search("Traceback|Warning|moetune train", done.stdout)


@pytest.mark.slow
def test_too_little_memory(place: Path) -> None:
    """Let the kernel kill a process, which then runs no more Python."""
    killed = AT_THE_WEIGHTS.format(what="os.kill(os.getpid(), signal.SIGKILL)")
    done = start(place, [*TRAIN, "--ranks", "2"], "memory", "data.workers=0", site=killed)
    _is_one_message(
        done, 1, r"rank 1 failed first: killed by SIGKILL, .* memory runs out .*\n.*lower data.tokens_per_pack"
    )
    assert "ChildFailedError" in (place / "runs/memory/logs/launcher.log").read_text()


@pytest.mark.slow
def test_a_lost_gpu(place: Path) -> None:
    done = start(place, [*TRAIN, "--ranks", "2"], "gpu", "data.workers=0", site=AT_THE_WEIGHTS.format(what=LOST_GPU))
    _is_one_message(done, 1, r"rank 1 failed first: CUDA error: uncorrectable ECC error .*\(GPU 1 of .*\n.*nvidia-smi")
    assert "in at_the_weights" in (place / "runs/gpu/logs/rank-0001.log").read_text()  # the traceback


def test_a_full_disk(place: Path) -> None:
    """Write the first picture to /dev/full, which accepts nothing."""
    (place / "runs/disk/media").mkdir(parents=True)
    (place / "runs/disk/media/step-000000-0.png").symlink_to("/dev/full")
    done = start(place, TRAIN, "disk", "data.workers=0", "parallel.ep=1")
    _is_one_message(
        done, 1, r"rank 0 failed first: \[Errno 28\] No space left on device.*\.\nThe disk is full: free space"
    )

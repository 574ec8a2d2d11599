import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import LIMIT_S
from places import ROOT
from ranks import PRELOADED, RankError, run_ranks


def whole_story(rank, world_size, factor):
    total = torch.full((), float(rank + 1))
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "MOETUNE_PROBE")
    return {
        "total": total * factor,
        "group": (dist.get_backend(), dist.get_rank(), dist.get_world_size()),
        "environment": [os.environ[name] for name in names],
        "cwd": str(Path.cwd()),
        "threads": torch.get_num_threads(),
        "loaded": [name for name in PRELOADED if name in sys.modules],
        "of_parent": (os.getppid(), len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))),
    }


@pytest.mark.parametrize("fresh", [False, True])
def test_every_rank_returns_its_value(monkeypatch, tmp_path, fresh):
    monkeypatch.setenv("MOETUNE_PROBE", "seen")  # set after the server's start, and ranks must still see it
    monkeypatch.chdir(tmp_path)
    results = run_ranks(whole_story, 3, 10, fresh=fresh)
    for rank, result in enumerate(results):
        assert result["total"].item() == 60
        assert result["group"] == ("gloo", rank, 3)
        assert result["environment"] == [str(rank), str(rank), "3", "cpu", "1", "seen"]
        assert result["cwd"] == str(tmp_path)
        assert result["threads"] == 1
        assert result["loaded"] == list(PRELOADED[:2] if fresh else PRELOADED)
        if fresh:
            assert result["of_parent"][0] == os.getpid()
        else:
            assert result["of_parent"] == (
                results[0]["of_parent"][0],
                1,
            )  # one thread, so that forking the server is safe


def raise_on_one(rank, world_size, culprit):
    if rank == culprit:
        sys.stdout.write("before the fall\n")
        sys.stderr.write("a warning of the fall\n")
        raise KeyError("the true origin")
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_earliest_failing_rank_is_reported_first(culprit):
    with pytest.raises(RankError) as caught:
        run_ranks(raise_on_one, 2, culprit)
    message = str(caught.value)
    assert caught.value.rank == culprit
    assert message.startswith(f"rank {culprit} of 2 failed:\nTraceback")
    first, rest = message.split(f"\n\nrank {1 - culprit} of 2 failed")  # the other rank lost its connection
    assert "in raise_on_one\n" in first
    assert "KeyError: 'the true origin'" in first
    assert "it printed:\nbefore the fall\na warning of the fall" in first
    assert "true origin" not in rest


def vanish_on_one(rank, world_size, how):
    if rank == 1:
        sys.stdout.write("last words\n")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(how)
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize(
    ("how", "words"), [(3, "exit code 3"), (0, "exit code 0"), ("kill", "signal SIGKILL")], ids=str
)
def test_a_rank_that_exits_without_raising_is_named(how, words):
    with pytest.raises(RankError) as caught:
        run_ranks(vanish_on_one, 2, how)
    message = str(caught.value)
    assert caught.value.rank == 1
    assert message.startswith(f"rank 1 of 2 exited without raising ({words})\n  it printed:\nlast words")
    assert "\n\nrank 0 of 2 failed:\n" in message


def hang_on_one(rank, world_size):
    if rank == 1:
        sleep_here()
    return rank


def sleep_here():
    time.sleep(3600)


def test_a_rank_that_hangs_is_named_with_its_stack():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 of 2 was still running after 8 s; its stack:\n") as caught:
        run_ranks(hang_on_one, 2, timeout=8)
    assert "in sleep_here" in str(caught.value)
    assert "rank 0" not in str(caught.value)
    assert time.monotonic() - started < LIMIT_S  # not an hour: it was ended


def miss_a_collective(rank, world_size):
    if rank == 1:
        sleep_here()
    dist.all_reduce(torch.zeros(1))


def test_a_missed_collective_shows_the_stacks_of_both_ranks():
    with pytest.raises(RankError, match=r"^rank 0 of 2 failed:\n") as caught:
        run_ranks(miss_a_collective, 2, timeout=6)  # the process group gives up after 3 s
    first, rest = str(caught.value).split("\n\nrank 1 of 2 was still running, and was ended; its stack:\n")
    assert "all_reduce" in first
    assert "in sleep_here" in rest


def return_a_lambda(rank, world_size):
    return lambda: rank


def test_a_result_that_cannot_be_pickled_is_a_failure():
    with pytest.raises(RankError, match=r"(?s)^rank [01] of 2 failed:.*return_a_lambda"):
        run_ranks(return_a_lambda, 2)


def test_a_local_function_is_refused():
    with pytest.raises((AttributeError, TypeError), match="local object"):
        run_ranks(lambda rank, world_size: rank, 2)


def test_ranks_end_when_the_test_run_is_killed(tmp_path):
    """A killed pytest must not leave running ranks behind."""
    script = tmp_path / "orphans.py"
    script.write_text(
        "import os, sys, time\n"
        "from ranks import run_ranks\n"
        "def f(rank, world_size):\n"
        "    open(f'{sys.argv[1]}/{rank}.pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    run_ranks(f, 2)\n"
    )
    here = str(ROOT / "tests" / "harness")
    parent = subprocess.Popen([sys.executable, script, tmp_path], env={**os.environ, "PYTHONPATH": here})
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    try:
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(still_runs(file.read_text()) for file in files))


def still_runs(pid):
    """Return whether a process runs; a zombie does not, and without an init that reaps them, orphans stay zombies."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition):
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, f"waited {LIMIT_S:g} s in vain"
        time.sleep(0.05)

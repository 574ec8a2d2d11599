"""Holders of a run's folder: one start at a time, its restarts on any host, and a start after a dead one."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from data.prepare.folder_lock import Holder, process_start, read_holder, release, take, this_process
from finetune.checkpoint.run_lock import LOCK, holder_of, launch_id, take_run, take_run_for_ranks
from finetune.ranks.failures import meeting

ELSEWHERE = {"host": "another-machine"}


def alive() -> Holder:
    """Return the lock of a living process on this machine that is not this one."""
    return replace(this_process("launch 1"), pid=os.getppid(), started=process_start(os.getppid()))


def dead() -> Holder:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return replace(this_process("launch 1"), pid=done.pid)


def write(folder: Path, holder: Holder, *, silence: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    path.write_text(json.dumps(vars(holder)))
    then = time.time() - silence
    os.utime(path, (then, then))
    return path


def start(
    folder: Path, launch: str = "launch 2", *, limit: float = 60.0, last_sign: float = 0.0
) -> tuple[Holder, list[str]]:
    mine, lines = this_process(launch), []
    take(folder / LOCK, mine, limit=limit, last_sign=lambda: last_sign, say=lines.append, cure="set another run.name")
    assert read_holder(folder / LOCK) == mine
    assert [path.name for path in folder.iterdir()] == [LOCK]
    return mine, lines


def test_the_first_start_holds_the_folder_and_removes_its_lock(tmp_path: Path) -> None:
    mine, lines = start(tmp_path / "run")
    assert lines == []
    release(tmp_path / "run" / LOCK, replace(mine, pid=1))  # the lock of another start stays
    assert (tmp_path / "run" / LOCK).exists()
    release(tmp_path / "run" / LOCK, mine)
    release(tmp_path / "run" / LOCK, mine)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("launch", ["launch 1", "launch 2"])
def test_a_living_process_of_this_host_keeps_its_folder(tmp_path: Path, launch: str) -> None:
    holder = alive()
    write(tmp_path, holder, silence=1e6)
    words = (
        rf"{tmp_path} is in use by process {holder.pid} on {holder.host}, since .* Wait for it to end, or set another"
    )
    with pytest.raises(ValueError, match=words):
        start(tmp_path, launch)
    assert read_holder(tmp_path / LOCK) == holder


def test_the_lock_of_an_ended_process_is_taken_over_with_a_message(tmp_path: Path) -> None:
    holder = dead()
    write(tmp_path, holder)
    _, (line,) = start(tmp_path)
    assert line == f"took over {tmp_path} from {holder}: that process has ended"


@pytest.mark.parametrize("other", [{"started": 1}, {"boot": "before", "namespace": "pid:[1]"}])
def test_a_reused_process_id_does_not_hold_the_folder(tmp_path: Path, other: dict) -> None:
    write(tmp_path, replace(alive(), **other))
    _, (line,) = start(tmp_path)
    assert "that process has ended" in line


@pytest.mark.parametrize("other", [ELSEWHERE, {"namespace": "pid:[1]"}], ids=["another host", "another container"])
def test_a_holder_on_another_host_counts_as_alive_until_it_was_silent_for_the_limit(
    tmp_path: Path, other: dict
) -> None:
    holder = replace(dead(), **other)
    path = write(tmp_path, holder, silence=100)
    with pytest.raises(ValueError, match="is in use by"):
        start(tmp_path, limit=120)
    with pytest.raises(ValueError, match="is in use by"):
        start(tmp_path, limit=60, last_sign=path.stat().st_mtime + 90)
    with pytest.raises(ValueError, match="is in use by"):
        start(tmp_path, limit=0)
    _, (line,) = start(tmp_path, limit=60)
    assert "nothing was written there for 100 s, and the limit is 60 s" in line


@pytest.mark.parametrize("other", [{}, ELSEWHERE], ids=["this host", "another host"])
def test_a_restart_of_one_launch_continues_silently(tmp_path: Path, other: dict) -> None:
    write(tmp_path, replace(dead(), **other))
    assert start(tmp_path, "launch 1")[1] == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pid": "1"}'])
def test_a_file_that_is_not_a_lock_is_not_removed(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(ValueError, match="is not a lock that moetune wrote. Remove it if nothing uses that folder"):
        start(tmp_path)
    assert (tmp_path / LOCK).read_text() == text


def test_only_one_of_many_concurrent_takeovers_succeeds(tmp_path: Path) -> None:
    write(tmp_path, dead())
    program = (
        "import sys, time; from pathlib import Path; from data.prepare.folder_lock import *\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try: take(Path(sys.argv[1]), this_process(), limit=60, last_sign=lambda: 0.0, say=str, cure='no')\n"
        "except ValueError: sys.exit(2)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / LOCK), str(time.time() + 1.5)]
    starts = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(6)]
    held = lambda: sum(start.poll() is None for start in starts)  # noqa: E731
    while held() > 1:
        time.sleep(0.05)
    assert held() == 1
    codes = [start.communicate(b"")[0] or start.returncode for start in starts]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2]


def test_a_launch_is_identified_by_its_job_its_run_or_the_process_that_started_the_ranks() -> None:
    run = {"TORCHELASTIC_RUN_ID": "3f2a", "RANK": "0"}
    slurm = {**run, "SLURM_JOB_ID": "77"}
    assert launch_id(slurm, 1) == "Slurm job 77.0 torchrun 3f2a"
    assert launch_id({**slurm, "SLURM_RESTART_COUNT": "2"}, 1) == "Slurm job 77.2 torchrun 3f2a"
    assert launch_id({"SLURM_JOB_ID": "77"}, 1) == "Slurm job 77.0"
    assert launch_id(run, 1) == "torchrun 3f2a"
    parent = os.getppid()
    assert launch_id({**run, "TORCHELASTIC_RUN_ID": "none"}, parent) == f"launcher {parent}.{process_start(parent)}"
    assert launch_id({}, parent) == ""  # the parent of the shell


def test_a_second_start_of_a_slurm_job_is_refused_but_a_requeued_one_continues(tmp_path: Path, monkeypatch) -> None:
    """Refuse it although the first one runs on another node, where its process cannot be seen."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write(tmp_path, replace(alive(), launch="Slurm job 77.0 torchrun first", **ELSEWHERE))
    start = partial(take_run_for_ranks, tmp_path, run_id="second", stall_seconds=60, say=print)
    assert holder_of(tmp_path, run_id="second", stall_seconds=60) is not None
    with pytest.raises(ValueError, match="is in use by .*started by Slurm job 77.0 torchrun first"):
        start()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(ValueError, match="is in use by"):
        start()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert holder_of(tmp_path, run_id="second", stall_seconds=60) is None
    start()()
    assert list(tmp_path.iterdir()) == []


def test_the_other_ranks_write_nothing_before_rank_0_holds_the_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("finetune.checkpoint.run_lock.WAIT_S", 0.2)
    settings = {"RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    earlier = replace(alive(), meeting=meeting({**settings, "MASTER_PORT": "2"}))
    for begin in (lambda: None, lambda: write(tmp_path, earlier)):
        begin()
        with pytest.raises(ValueError, match="rank 0 of this start did not take .*lock.json within 0.2 s"):
            take_run(tmp_path, stall_seconds=60, say=print)
    (tmp_path / LOCK).unlink()
    monkeypatch.setenv("RANK", "0")
    give_back = take_run(tmp_path, stall_seconds=60, say=print)
    monkeypatch.setenv("RANK", "1")
    take_run(tmp_path, stall_seconds=60, say=print)()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]  # rank 1 releases nothing
    give_back()
    assert list(tmp_path.iterdir()) == []
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(ValueError, match="the launcher that started this rank is gone"):
        take_run(tmp_path, stall_seconds=60, say=print)


def test_the_launcher_holds_the_folder_until_its_own_rank_0_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("RANK", "0")
    give_back = take_run_for_ranks(tmp_path, run_id="3f2a", stall_seconds=60, say=print)
    first = read_holder(tmp_path / LOCK)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    for second in (take_run, partial(take_run_for_ranks, run_id="another")):
        with pytest.raises(ValueError, match=r"is in use by process \d+ .*started by torchrun 3f2a"):
            second(tmp_path, stall_seconds=60, say=print)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "3f2a")
    lines: list[str] = []
    take_run(tmp_path, stall_seconds=60, say=lines.append)
    assert lines == []
    holder = read_holder(tmp_path / LOCK)
    assert (first.launch, first.meeting) == (holder.launch, "3f2a")
    give_back()  # the lock of rank 0 stays
    assert read_holder(tmp_path / LOCK) == holder


def test_a_heartbeat_keeps_the_folder_of_another_host(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    write(tmp_path, replace(dead(), **ELSEWHERE), silence=1000)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0003.json").write_text("{}")
    with pytest.raises(ValueError, match="is in use by .* another-machine"):
        take_run(tmp_path, stall_seconds=60, say=print)
